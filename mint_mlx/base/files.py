"""Files that are written as a whole or not at all, and locks between processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from .remove import PARTIAL, move, remove_file

PLAN_FILE = "mint-plan.yaml"  # in every checkpoint that we wrote
REFINED_FILE = "mint-refined.json"  # in every checkpoint that we refined
# Names the base model of a repository of which only the headers are on this machine.
BASE_MODEL = ".base_model"
LOCK = "lock"  # in a folder that a process works in
MARK = "A folder of mint-mlx.\n"  # in that file: the folder may be emptied


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that replaces it at the end; a failure leaves nothing.

    The temporary name ends as `path` does, since some writers choose the format by the ending or
    append it.
    """
    partial = path.with_name(f".{uuid4().hex}{PARTIAL}{path.suffix}")
    try:
        yield partial

        # safetensors makes its files readable by their owner only: apply the user's umask instead.
        mask = os.umask(0o022)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)

        sync(partial)
        move(partial, path)
    finally:
        remove_file(partial)


def sync(path: Path) -> None:
    """Flush a file to the disk, so that no crash leaves its name without its data."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a path, so that no other process works on it.

    Args:
        path: the file or folder; the lock is a hidden file beside it.
        on_wait: called once where another process holds the lock, before waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        if not _lock(file):
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, with its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def lock_folder(folder: Path) -> IO[str] | None:
    """Lock a folder of ours until the returned file is closed; None where another process has it.

    The lock marks the folder as ours, so the caller has checked that it is.
    """
    file = (folder / LOCK).open("a")
    if _lock(file):
        if not os.fstat(file.fileno()).st_size:
            file.write(MARK)
            file.flush()
        return file
    file.close()
    return None


def _lock(file: IO[str]) -> bool:
    """Lock a file until it is closed; False where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
