"""Where results may be written: never over something that isn't ours."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MintError
from .units import both

if TYPE_CHECKING:
    pass
from .files import PLAN_FILE, REFINED_FILE

PATTERN = "*?["  # mlx-lm looks for weights with a pattern made of the folder's name


OLD = ".replaced"


def check_space(folder: Path, needed: int, instead: str = "choose another folder with -o") -> None:
    """Refuse where the disk has too little room.

    Raises:
        MintError: with the figures, and what to do `instead` of freeing some.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MintError(
            f"the disk of {folder.resolve()} has {both(free)} free, but {both(needed)} are needed: "
            f"free some space or {instead}"
        )


def check_file(path: Path, marker: str, force: bool = False) -> None:
    """Refuse to write a file where it can't be or over something else.

    Args:
        path: where to write.
        marker: what a file of this kind holds near its beginning.
        force: replace an existing file of this kind.

    Raises:
        MintError: the folder is missing, the path is a folder, or a file is there that may not be
            replaced.
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
            raise MintError(
                f"{path} exists already: choose another file with -o, or replace it with --force"
            )


def check_rights(folder: Path) -> None:
    """Refuse a folder in which this user may not write (a MintError)."""
    if not os.access(folder, os.W_OK):
        raise MintError(
            f"the folder {folder} cannot be written to: check its rights, or choose another with -o"
        )


def check_picture(path: Path) -> None:
    """Refuse to draw where no picture can be written.

    Raises:
        MintError: its folder is missing, or it doesn't end in .png, .pdf or .svg.
    """
    if (
        path.suffix not in (".png", ".pdf", ".svg")
        or path.is_dir()
        or not path.absolute().parent.is_dir()
    ):
        raise MintError(
            f"{path} cannot be drawn: give a .png, .pdf or .svg file in an existing folder"
        )


def check_name(path: Path, what: str) -> None:
    """Refuse a folder whose name mlx-lm can't handle.

    Raises:
        MintError: it holds a pattern's or a control character.
    """
    bad = [c for c in str(path) if c in PATTERN or not c.isprintable()]
    if bad:
        raise MintError(
            f"the {what}'s path {str(path)!r} holds {bad[0]!r}, which mlx-lm cannot handle: rename "
            "it"
        )


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
        raise MintError(
            f"{target} exists already: choose another folder with -o, or replace it with --force"
        )
    place = target.resolve()
    for precious, word in ((source, "the source"), (Path.cwd(), "the current folder")):
        if precious is not None and (
            precious.resolve() == place or place in precious.resolve().parents
        ):
            raise MintError(
                f"{target} is or holds {word}, which --force would delete: choose another folder "
                "with -o"
            )
    if any(target.iterdir()) and not _is_ours(target):
        raise MintError(
            f"{target} is not a checkpoint that mint-mlx wrote, so --force does not replace it: "
            "choose another"
        )


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that this program wrote."""
    kept = any((folder / name).is_file() for name in (PLAN_FILE, REFINED_FILE))
    return kept and (folder / "config.json").is_file()


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
    for old in target.parent.glob(
        f"{glob.escape(target.name)}{OLD}-*"
    ):  # also one that a killed run left
        if old.name.rpartition("-")[2].isdigit() and (_is_ours(old) or not any(old.iterdir())):
            shutil.rmtree(old)
