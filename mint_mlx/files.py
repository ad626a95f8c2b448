"""Where results may be written, and how: whole or not at all, and never over something that isn't ours."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

from .errors import MintError
from .units import both

if TYPE_CHECKING:
    import mlx.core as mx

PATTERN = "*?["  # mlx-lm looks for weights with a pattern made of the folder's name
PLAN_FILE = "mint-plan.yaml"  # in every checkpoint that we wrote
REFINED_FILE = "mint-refined.json"  # in every checkpoint that we refined
OLD = ".replaced"
PARTIAL = ".part"  # in the name of a file that isn't whole
LOCK = "lock"  # in a folder that a process works in


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once it is whole; what fails leaves nothing.

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
    """Wait until a file is on the disk, so that a crash of the machine can't leave its name without its data."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def keep_tensors(path: Path, tensors: dict[str, mx.array]) -> None:
    """Write tensors into a .safetensors file, so that it is there as a whole or not at all."""
    import mlx.core as mx

    with whole(path) as partial:
        mx.save_safetensors(str(partial), tensors)


def kept_tensors(path: Path) -> dict[str, mx.array]:
    """Read them, at once: the file may go."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
        mx.eval(tensors)
    return tensors


def check_space(folder: Path, needed: int, instead: str = "choose another folder with -o") -> None:
    """Refuse where the disk has too little room.

    Raises:
        MintError: with the figures, and what to do `instead` of freeing some.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MintError(
            f"the disk of {folder.resolve()} has {both(free)} free, but {both(needed)} are needed: free some space or "
            f"{instead}"
        )


@contextmanager
def alone(place: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Work on a place that no other process works on; `waiting` is called where one does, until which is done."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("a") as file:
        if not _lock(file):
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_arrays(path: Path, arrays: dict[str, Any], about: dict[str, str] | None = None) -> None:
    """Write numpy arrays as a safetensors file, so that it is there as a whole or not at all.

    Raises:
        OSError: as of any other file (safetensors has an error of its own).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
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


def check_file(path: Path, marker: str, force: bool = False) -> None:
    """Refuse to write a file where it can't be or over something else.

    Args:
        path: where to write.
        marker: what a file of this kind holds near its beginning.
        force: replace an existing file of this kind.

    Raises:
        MintError: the folder is missing, the path is a folder, or a file is there that may not be replaced.
    """
    if not path.name or path.is_dir() or not path.absolute().parent.is_dir():
        raise MintError(f"{path} cannot be written: give a file in an existing folder with -o")
    check_rights(path.absolute().parent)
    if path.exists():
        with path.open("rb") as file:
            ours = marker.encode() in file.read(1000)
        if not ours:
            raise MintError(f"{path} exists and is something else: choose another file with -o")
        if not force:
            raise MintError(f"{path} exists already: choose another file with -o, or replace it with --force")


def check_rights(folder: Path) -> None:
    """Refuse a folder in which this user may not write (a MintError)."""
    if not os.access(folder, os.W_OK):
        raise MintError(f"the folder {folder} cannot be written to: check its rights, or choose another with -o")


def check_picture(path: Path) -> None:
    """Refuse to draw where no picture can be written.

    Raises:
        MintError: its folder is missing, or it doesn't end in .png, .pdf or .svg.
    """
    if path.suffix not in (".png", ".pdf", ".svg") or path.is_dir() or not path.absolute().parent.is_dir():
        raise MintError(f"{path} cannot be drawn: give a .png, .pdf or .svg file in an existing folder")


def check_name(path: Path, what: str) -> None:
    """Refuse a folder whose name mlx-lm can't handle.

    Raises:
        MintError: it holds a pattern's or a control character.
    """
    bad = [c for c in str(path) if c in PATTERN or not c.isprintable()]
    if bad:
        raise MintError(f"the {what}'s path {str(path)!r} holds {bad[0]!r}, which mlx-lm cannot handle: rename it")


def check_target(target: Path, source: Path | None, force: bool) -> None:
    """Refuse a folder to write to that can't be, or that would cost something.

    Args:
        target: the folder.
        source: the folder that is read from, which may not be touched.
        force: replace an existing checkpoint of ours.

    Raises:
        MintError: saying what stands there and what to do.
    """
    name = target.name
    if name in ("", ".", "..") or len(name.encode()) > 200:
        raise MintError(f"{str(target)!r} is not a name for a new folder: give another one with -o")
    check_name(target.absolute(), "output folder")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise MintError(f"the folder {parent} does not exist: make it, or choose another with -o")
    check_rights(parent)
    if target.is_symlink():
        raise MintError(f"{target} is a link: give the folder itself with -o")
    if not target.exists():
        return
    if not target.is_dir():
        raise MintError(f"{target} is a file: choose another folder with -o")
    if not force:
        raise MintError(f"{target} exists already: choose another folder with -o, or replace it with --force")
    place = target.resolve()
    for precious, word in ((source, "the source"), (Path.cwd(), "the current folder")):
        if precious is not None and (precious.resolve() == place or place in precious.resolve().parents):
            raise MintError(f"{target} is or holds {word}, which --force would delete: choose another folder with -o")
    if any(target.iterdir()) and not _is_ours(target):
        raise MintError(
            f"{target} is not a checkpoint that mint-mlx wrote, so --force does not replace it: choose another"
        )


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that this program wrote."""
    kept = any((folder / name).is_file() for name in (PLAN_FILE, REFINED_FILE))
    return kept and (folder / "config.json").is_file()


def lock_folder(folder: Path) -> IO[str] | None:
    """Lock a folder for this process, until the file that is returned is closed; None where another one has it."""
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


def work_folder(target: Path) -> Path:
    """The folder beside the target in which the work is done."""
    return target.with_name(target.name + ".partial")


def put_in_place(work: Path, target: Path, force: bool) -> None:
    """Give finished work its name; what stood there before is removed only after that.

    Raises:
        MintError: something has appeared at the target meanwhile.
    """
    if target.exists():
        check_target(target, None, force)
        target.replace(target.with_name(f"{target.name}{OLD}-{os.getpid()}"))
    work.replace(target)
    for old in target.parent.glob(f"{glob.escape(target.name)}{OLD}-*"):  # also one that a killed run left
        if old.name.rpartition("-")[2].isdigit() and (_is_ours(old) or not any(old.iterdir())):
            shutil.rmtree(old)
