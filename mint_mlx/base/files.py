"""Files that are written as a whole or not at all, and locks between processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from .remove import PARTIAL, UNFINISHED, move, remove_file
from .side_files import matches

PLAN_FILE = "mint-plan.yaml"  # in every checkpoint that we wrote
REFINED_FILE = "mint-refined.json"  # in every checkpoint that we refined
MEASURED_FILE = "mint-measured.json"  # what was measured of a checkpoint, for its report
PAGE_FILE = "report.html"
MTP_FILE = "mtp.safetensors"  # blocks for multi-token prediction, beside the model's shards
OPTIQ = "optiq"  # the folder in which mlx-optiq puts files beside the model
TOWER_FILE = "optiq_vision.safetensors"  # towers for mlx-optiq alone
MTP_PLACES = (MTP_FILE, f"{OPTIQ}/{MTP_FILE}")
TOWER_PLACES = (TOWER_FILE, f"{OPTIQ}/{TOWER_FILE}")
# Names the base model of a repository of which only the headers are on this machine.
BASE_MODEL = ".base_model"
LOCK = "lock"  # in a folder that a process works in
MARK = "A folder of mint-mlx.\n"  # in that file: the folder may be emptied
MARK_FILE = ".mint-mlx"  # holds the mark in a folder whose files have names of others


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that replaces it at the end; a failure leaves nothing.

    What a killed process left of an earlier attempt at the same path is deleted. The temporary name
    ends as `path` does, since some writers choose the format by the ending or append it.
    """
    key = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    _remove_abandoned(path, key)
    partial = path.with_name(f".{key}{uuid4().hex[:16]}{PARTIAL}{path.suffix}")
    try:
        with partial.open("a") as file:
            lock_file(file)
            yield partial

        # Some writers put a new file in its place, which is not locked yet.
        with partial.open("a") as file:
            lock_file(file)

            # safetensors makes its files readable by their owner only: apply the user's umask.
            mask = os.umask(0o022)
            os.umask(mask)
            partial.chmod(0o666 & ~mask)

            os.fsync(file.fileno())
            move(partial, path)
    finally:
        remove_file(partial)


def _remove_abandoned(path: Path, key: str) -> None:
    """Delete temporary files for `path`, whose names begin with `key`, that no process has open."""
    for other in path.parent.iterdir():
        if other.name.startswith(f".{key}") and matches(other.name, (UNFINISHED,)):
            with lock_abandoned(other) as abandoned:
                if abandoned:
                    remove_file(other)


@contextmanager
def lock_abandoned(path: Path) -> Iterator[bool]:
    """Lock a file where the process that had it locked has ended, as far as a lock can tell.

    False where it is locked, was deleted meanwhile, is another user's, or on a system without
    locks.
    """
    try:
        file = path.open("r+b")
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield path.exists()


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a path, so that no other process works on it.

    Args:
        path: the file or folder; the lock is a hidden file beside it.
        on_wait: called once where another process holds the lock, before waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_to_append(path.with_name(f".{path.name}.lock")) as file:
        if not lock_file(file):
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
    file = open_to_append(folder / LOCK)
    if lock_file(file):
        if not os.fstat(file.fileno()).st_size:
            file.write(MARK)
            file.flush()
        return file
    file.close()
    return None


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to append to it, as `open` does; a pipe of its name is an OSError.

    Opening a pipe that nobody reads would never end.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, 0o666)

    return open(path, "a", encoding="utf-8", opener=opener)


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Keep others from locking a file; where it can't be made, they can't change what is beside."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open_to_append(path)), fcntl.LOCK_SH)
        yield


def lock_file(file: IO[str]) -> bool:
    """Lock a file until it is closed; False where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
