"""Where results may be written: never over something that this program did not write."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from .errors import MintError
from .files import PAGE_FILE
from .folders import CHECKPOINT, REPORT, is_report
from .pictures import is_page, is_picture
from .remove import Stranger, check_removable, discard, find_stranger, move, remove_folder
from .report import Report, Silent
from .units import both

PATTERN = "*?["  # mlx-lm finds weights by a glob pattern that begins with the folder's name
OLD = ".replaced"  # in the name of a checkpoint that --force replaces, until it is deleted


def check_space(folder: Path, needed: int, instead: str = "choose another folder with -o") -> None:
    """Refuse to start where the disk has too little free space.

    Args:
        folder: on the disk in question.
        needed: bytes.
        instead: what a user may do in place of freeing some space.

    Raises:
        MintError: with both figures.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MintError(
            f"the disk of {folder.resolve()} has {both(free)} free, but {both(needed)} are needed: "
            f"free some space or {instead}"
        )


def check_file(path: Path, marker: bytes, force: bool = False, option: str = "-o") -> None:
    """Refuse to write a file where that is impossible, or over a file of another kind.

    Args:
        path: where to write.
        marker: a regular expression that the first 1000 bytes of a file of this kind match.
        force: replace an existing file of this kind.
        option: that names it.

    Raises:
        MintError: the folder is missing, the path is a folder, or a file is there that may not be
            replaced.
    """
    if not path.name or path.is_dir() or not path.absolute().parent.is_dir():
        raise MintError(
            f"{path} cannot be written: give a file in an existing folder with {option}"
        )
    check_writable(path.absolute().parent, option)
    if path.exists():
        with path.open("rb") as file:
            ours = re.search(marker, file.read(1000), re.MULTILINE | re.DOTALL) is not None
        if not ours:
            raise MintError(
                f"{path} exists and is something else: choose another file with {option}"
            )
        if not force:
            raise MintError(
                f"{path} exists already: choose another file with {option}, or replace it with "
                "--force"
            )


def check_writable(folder: Path, option: str = "-o") -> None:
    """Refuse a folder in which this user may not write, or nobody can (a MintError).

    `option` names the folder or what is to be written there."""
    # /proc and its like have no blocks: root has every permission there, and makes no file.
    if not os.access(folder, os.W_OK) or not os.statvfs(folder).f_blocks:
        raise MintError(
            f"the folder {folder} cannot be written to: check its permissions, or choose another "
            f"with {option}"
        )


def check_picture(path: Path) -> None:
    """Refuse a path to which no picture can be written, or at which one of someone else's is.

    Raises:
        MintError: its folder is missing, it doesn't end in .png, .pdf or .svg, or it exists and
            this program didn't draw it.
    """
    writable = not path.is_dir() and path.absolute().parent.is_dir()
    if path.suffix not in (".png", ".pdf", ".svg") or not writable:
        raise MintError(
            f"no picture can be written to {path}: give a .png, .pdf or .svg file in an existing "
            "folder"
        )
    if path.exists() and not is_picture(path):
        raise MintError(
            f"{path} exists and is not a picture that mint-mlx drew: choose another file"
        )


def check_name(path: Path, what: str) -> None:
    """Refuse a folder whose name mlx-lm can't handle.

    Raises:
        MintError: its path contains a character of a glob pattern or a control character.
    """
    bad = [c for c in str(path) if c in PATTERN or not c.isprintable()]
    if bad:
        raise MintError(
            f"the {what}'s path {str(path)!r} contains {bad[0]!r}, which mlx-lm cannot handle: "
            "rename it"
        )


def check_target(target: Path, source: Path | None, force: bool, option: str = "-o") -> None:
    """Refuse an output folder that can't be written, or whose writing would delete something else.

    Args:
        target: the folder.
        source: the folder that is read from, which may not be touched.
        force: replace an existing checkpoint of ours.
        option: that names the folder.

    Raises:
        MintError: naming the obstacle and what to do.
    """
    name = target.name
    if name in ("", ".", "..") or len(os.fsencode(name)) > 200:
        raise MintError(
            f"{str(target)!r} is not a valid name for a new folder: give another one with {option}"
        )
    check_name(target.absolute(), "output folder")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise MintError(
            f"the folder {parent} does not exist: make it, or choose another with {option}"
        )
    check_writable(parent, option)
    if target.is_symlink():
        raise MintError(f"{target} is a link: give the folder itself with {option}")

    # An existing folder is replaced only on --force, and only where nothing else would be lost.
    if not target.exists():
        return
    if not target.is_dir():
        raise MintError(f"{target} is a file: choose another folder with {option}")
    if not force:
        raise MintError(
            f"{target} exists already: choose another folder with {option}, or replace it with "
            "--force"
        )
    _check_replaceable(target, source)


def _check_replaceable(target: Path, source: Path | None) -> None:
    """Refuse to replace a folder that holds anything but a checkpoint that this program wrote.

    Raises:
        MintError: naming what it is or holds.
    """
    resolved = target.resolve()
    for folder, word in ((source, "the source"), (Path.cwd(), "the current folder")):
        if folder is not None and resolved in (folder.resolve(), *folder.resolve().parents):
            raise MintError(
                f"{target} is or contains {word}, which --force would delete: choose another "
                "folder with -o"
            )
    if any(target.iterdir()):
        check_removable(target, CHECKPOINT, ", or choose another folder with -o")


def work_folder(target: Path) -> Path:
    """The folder beside the target in which a run works until the result is finished."""
    return target.with_name(target.name + ".partial")


def put_in_place(work: Path, target: Path, force: bool, report: Report | None = None) -> None:
    """Rename a finished work folder to the target; what stood there is deleted only after that.

    Args:
        work: the folder that gets the target's name.
        target: the name.
        force: replace a checkpoint of ours there.
        report: is told where the old checkpoint holds something that came meanwhile, and stays.

    Raises:
        MintError: something else has appeared at the target meanwhile.
    """
    number = os.getpid()
    while (replaced := target.with_name(f"{target.name}{OLD}-{number}")).exists():
        number += 1
    if target.exists():
        check_target(target, None, force)
        move(target, replaced)
    move(work, target)

    if replaced.is_dir():
        try:
            _remove_replaced(replaced)
        except Stranger as error:
            (report or Silent()).note(str(error))

    # Also deletes a replaced checkpoint that an earlier, killed run left.
    name = re.compile(re.escape(f"{target.name}{OLD}-") + r"\d+")
    for old in sorted(target.absolute().parent.iterdir()):
        if not name.fullmatch(old.name) or old.is_symlink() or not old.is_dir():
            continue
        if not any(old.iterdir()) or find_stranger(old, CHECKPOINT) is None:
            _remove_replaced(old)


def _remove_replaced(folder: Path) -> None:
    """Delete a checkpoint that was replaced, or the empty folder that stood there."""
    if any(folder.iterdir()):
        remove_folder(folder, CHECKPOINT)
    else:
        discard(folder, CHECKPOINT)


def check_report_folder(folder: Path) -> None:
    """Refuse a folder in which `compare` would write over files that are not its own.

    Raises:
        MintError: naming the file.
    """
    present = [name for name in REPORT if (folder / name).exists()]
    links = [name for name in REPORT if (folder / name).is_symlink()]
    if links or (present and not is_report(folder)):
        raise MintError(
            f"{folder} holds a {(links or present)[0]} that `mint-mlx compare` did not write: "
            "choose another folder with -o"
        )


def check_page_folder(folder: Path, pictures: Iterable[str] = ()) -> None:
    """Refuse a folder in which a page and its pictures would be written over someone else's.

    Args:
        folder: where they go.
        pictures: names of their files.

    Raises:
        MintError: the folder can't be written to, or naming the file.
    """
    if not folder.is_dir():
        raise MintError(f"{folder} is no folder: make it, or choose another with -o")
    check_writable(folder)
    files = [(PAGE_FILE, is_page), *((name, is_picture) for name in pictures)]
    for name, is_ours in files:
        path = folder / name
        if path.is_symlink() or (path.exists() and not is_ours(path)):
            raise MintError(
                f"{folder} holds a {name} that mint-mlx did not write: move it away, or choose "
                "another folder with -o"
            )
