"""Resume notes of an interrupted run, beside the file that the run makes.

Of a profile they hold one line of JSON for each measured layer; of a sensitivity the tokens that
the model has written. Notes of another version of this program are ignored.
"""

from __future__ import annotations

import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..base.distributed import ranks
from ..base.files import atomic_write
from ..base.remove import remove_file
from ..base.versions import stamp

_NOTES = re.compile(r"[0-9a-f]{8}-[\w.-]+")  # the stamp, then a rank or a kind of tokens


def read_curves(target: Path) -> dict[str, Any]:
    """The noted curves of all ranks by layer path; lines that were cut short are skipped.

    Args:
        target: the file that the run makes.
    """
    curves: dict[str, Any] = {}
    for file in _files(target, stamp()):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                curves |= json.loads(line)
            except (ValueError, TypeError):
                continue
    return curves


def append_curve(target: Path, path: str, curve: Any) -> None:
    """Note one layer's curve, in this rank's own file.

    A note that can't be written is skipped: the user hears of it when the profile itself can't be
    written to the same folder.
    """
    notes = target.with_name(f"{target.name}.begun-{stamp()}-{ranks().rank}")
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps({path: curve}) + "\n")


def read_tokens(target: Path, kind: str) -> tuple[np.ndarray, int] | None:
    """The noted tokens of a kind, and how many batches or passes were finished; None without notes.

    Args:
        target: the file that the run makes.
        kind: names one of several texts that the run writes.
    """
    try:
        with np.load(_tokens_file(target, kind)) as arrays:
            return arrays["tokens"], int(arrays["done"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write_tokens(target: Path, kind: str, tokens: np.ndarray, done: int) -> None:
    """Note the tokens of a kind after `done` batches or passes; skipped where that fails."""
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(_tokens_file(target, kind)) as partial,
            partial.open("wb") as file,
        ):
            np.savez(file, tokens=tokens, done=done)


def clear(target: Path) -> None:
    """Delete all notes: the file is made."""
    for file in _files(target):
        remove_file(file)


def _tokens_file(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.begun-{stamp()}-{kind}")


def _files(target: Path, stamp: str = "") -> list[Path]:
    """The files of notes, of one version or of all."""
    if not target.parent.is_dir():
        return []
    return sorted(path for path in target.parent.iterdir() if is_notes(path, target.name, stamp))


def is_notes(path: Path, name: str, stamp: str = "") -> bool:
    """Whether a file holds resume notes, of the run that makes the file `name`."""
    beginning = f"{name}.begun-"
    rest = path.name.removeprefix(beginning)
    ours = path.name.startswith(beginning) and _NOTES.fullmatch(rest) is not None
    return ours and rest.startswith(stamp) and path.is_file() and not path.is_symlink()
