"""Builds the checkpoints of a comparison in the cache, where a second run finds them again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import schema
from ..base.checksum import Damaged, if_sound, of_files, read_checked, warn, with_checksum
from ..base.errors import MintError, explain
from ..base.files import MARK, MARK_FILE, exclusive, write_text
from ..base.folders import UNMARKED
from ..base.remove import discard, move, remove_folder
from ..base.report import Report
from ..base.versions import versions
from ..measure import cache
from ..measure.cache_files import BUILT, MADE
from .gguf_file import packed_bytes


@dataclass(frozen=True)
class Task:
    """A checkpoint to build, or the reason why it can't be.

    Attributes:
        method: as in the table.
        kind: `ours`, `peer` or `given`.
        sees_text: whether the method sees the baseline text.
        about: its parameters, for the table and the cache.
        size: bytes aimed at.
        key: what else decides the result, for the cache.
        build: writes it into a folder; None for one that exists already, or can't be built.
        foreign: whether others' code builds it, whose failures are rows of the table.
        folder: where it exists already.
        reason: why it can't be built.
    """

    method: str
    kind: str
    sees_text: bool
    about: str
    size: int
    key: str = ""
    build: Callable[[Path], Any] | None = None
    foreign: bool = False
    folder: Path | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Built:
    """A checkpoint that was built, or why it wasn't.

    Attributes:
        task: what was asked for.
        folder: the checkpoint, or None.
        cache_folder: the task's folder in the cache, which also holds its scores.
        bytes: of its safetensors files, or of the GGUF file that they were read from; those aimed
            at where there are none.
        seconds: that building took.
        reason: why it wasn't built, or None.
        unpacked: whether the folder holds the unpacked weights of a GGUF file.
    """

    task: Task
    folder: Path | None
    cache_folder: Path
    bytes: int
    seconds: float
    reason: str | None = None
    unpacked: bool = False


def build(task: Task, cache_folder: Path, report: Report) -> Built:
    """Build a checkpoint, or find it in the cache.

    Args:
        task: what to build.
        cache_folder: the cache of all checkpoints made from the same source.
        report: receives progress.

    Raises:
        Exception: a fault of ours, of the disk or the network. What fails in others' code, or is
            refused with a MintError, is returned with the reason.
    """
    content = f"{task.method}|{task.about}|{task.key}|{versions()}"
    digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
    folder = cache_folder / f"{cache.file_name(task.method)}-{digest}"
    if task.folder is not None:
        return Built(task, task.folder, folder, task.size, 0.0)
    if task.build is None:
        return Built(task, None, folder, task.size, 0.0, task.reason)

    checkpoint = folder / "checkpoint"
    wait = f"wait for another run that builds {task.method}"
    with exclusive(folder, lambda: report.stage(wait)):
        note = if_sound(folder / MADE, _read_note)
        if note is not None and checkpoint.is_dir():
            report.stage(f"check {task.method}, which the cache holds")
            if of_files(checkpoint) != note["files"]:
                warn(f"{checkpoint} is damaged: it is built anew")
                note = None
        if note is None or not (checkpoint.is_dir() or note["reason"]):
            report.stage(f"build {task.method} ({task.about})")
            note = _build_new(task, task.build, folder)

    if note["reason"]:
        return Built(task, None, folder, task.size, note["seconds"], note["reason"])
    packed = packed_bytes(checkpoint)
    size = stored_bytes(checkpoint) if packed is None else packed
    return Built(task, checkpoint, folder, size, note["seconds"], unpacked=packed is not None)


def _build_new(task: Task, write: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    """Build a checkpoint in its folder of the cache; returns the note that goes beside it.

    Raises:
        Stranger: the folder holds something that isn't ours.
    """
    # Ours goes on from what an interrupted run wrote; what is damaged goes, with its scores.
    if folder.is_dir() and (task.foreign or (folder / "checkpoint").exists()):
        remove_folder(folder, BUILT)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MARK_FILE, MARK)
    unfinished = folder / "unfinished"

    # A reason lasts where the next run would fail in the same way.
    started = time.monotonic()
    reason = None
    lasts = True
    try:
        write(unfinished)
    except MintError as error:
        reason = str(error)
        lasts = False
    except Exception as error:
        if not task.foreign or explain(error):
            raise
        reason = f"it fails here: {type(error).__name__}: {error}"
        # With more memory free it may succeed.
        lasts = not isinstance(error, (MemoryError, RuntimeError))

    if reason is not None:
        discard(unfinished, UNMARKED)
    files = {} if reason is not None else of_files(unfinished)
    note = {"seconds": time.monotonic() - started, "reason": reason, "files": files}
    if lasts:
        write_text(folder / MADE, with_checksum(json.dumps(note)))
    if reason is None:  # after the note, without which nobody knows how long it took
        move(unfinished, folder / "checkpoint")
    return note


def _read_note(path: Path) -> dict[str, Any]:
    """The note beside a checkpoint: `seconds` that it took, the checksums of its `files`, and the
    `reason` why there is none.

    Raises:
        Damaged: it isn't one.
    """
    try:
        note = read_checked(path)
        schema.number(note["seconds"], 0)
        schema.optional_text(note["reason"])
        return {key: note[key] for key in ("seconds", "reason", "files")}
    except (KeyError, TypeError, ValueError):
        raise Damaged(f"{path} is damaged") from None


def stored_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
