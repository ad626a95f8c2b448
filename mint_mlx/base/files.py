"""Where results may be written, and how: whole or not at all, and never over something that isn't
ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    import mlx.core as mx

PLAN_FILE = "mint-plan.yaml"  # in every checkpoint that we wrote
REFINED_FILE = "mint-refined.json"  # in every checkpoint that we refined
PARTIAL = ".part"  # in the name of a file that isn't whole
LOCK = "lock"  # in a folder that a process works in


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once it is whole; what fails leaves
    nothing.

    It ends as `path` does, since some writers go by that or add it.
    """
    partial = path.with_name(f".{uuid4().hex}{PARTIAL}{path.suffix}")
    try:
        yield partial
        mask = os.umask(0o022)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # safetensors' own files are for their owner alone
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk, so that a crash of the machine can't leave its name without
    its data.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: dict[str, mx.array]) -> None:
    """Write tensors into a .safetensors file, so that it is there as a whole or not at all."""
    import mlx.core as mx

    with atomic_write(path) as partial:
        mx.save_safetensors(str(partial), tensors)


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read them, at once: the file may go."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
        mx.eval(tensors)
    return tensors


@contextmanager
def exclusive(place: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Work on a place that no other process works on; `waiting` is called where one does, until
    which is done.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("a") as file:
        if not _lock(file):
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_arrays(path: Path, arrays: dict[str, Any], about: dict[str, str] | None = None) -> None:
    """Write numpy arrays as a safetensors file, so that it is there as a whole or not at all.

    Raises:
        OSError: as of any other file (safetensors has an error of its own).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        try:
            save_file(arrays, partial, metadata=about)
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
            raise


def read_json(path: Path) -> Any:
    """A cached JSON file, or None where there is none or it was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def lock_folder(folder: Path) -> IO[str] | None:
    """Lock a folder for this process, until the file that is returned is closed; None where another
    one has it.
    """
    file = (folder / LOCK).open("a")
    if _lock(file):
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
