"""Folders of temporary files, deleted at their end; what a kill leaves goes with the next one.

Each bears a mark, locked while its process lives, which says what kind of folder it is: the next
folder of the same kind is made once those of killed processes are deleted.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from .files import MARK, MARK_FILE, lock_abandoned, lock_file
from .remove import Kind, discard, find_stranger

PREFIX = "mint-mlx-"
_NAME = re.compile(PREFIX + r"(\d+)-\w{8}")  # with the number of the process
_open: dict[Path, Kind] = {}  # what this process made and may have to delete


@contextmanager
def scratch_folder(kind: Kind, beside: Path | None = None) -> Iterator[Path]:
    """A new folder that is deleted at the end; what someone else puts into it stays.

    Args:
        kind: what will be written there.
        beside: the folder to make it in; the system's for temporary files by default.
    """
    folder, lock = open_scratch(kind, beside)
    with lock:
        try:
            yield folder
        finally:
            discard(folder, _open.pop(folder))


def open_scratch(kind: Kind, beside: Path | None = None) -> tuple[Path, IO[str]]:
    """Make such a folder, once those of this kind that killed processes left are deleted.

    Returns:
        The folder, and its mark, which is locked until it is closed: then `discard` the folder.
    """
    parent = beside or Path(tempfile.gettempdir())
    kind = scratch_kind(kind)
    _remove_abandoned(parent, kind)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=beside))
    mark = (folder / MARK_FILE).open("a", encoding="utf-8")
    lock_file(mark)
    mark.write(f"{MARK}{kind.what}\n")
    mark.flush()
    _open[folder] = kind
    return folder, mark


def discard_open() -> None:
    """Delete all temporary folders of this process, at an end that runs nothing else."""
    for folder, kind in list(_open.items()):
        discard(folder, kind)


def scratch_kind(kind: Kind) -> Kind:
    """The kind of a temporary folder in which a kind of folder is written."""

    def is_ours(folder: Path) -> bool:
        return _is_users(folder) and _mark(folder)[:2] == [MARK.strip(), kind.what]

    files = (*kind.files, MARK_FILE)
    return replace(kind, files=files, is_ours=is_ours, marks=(*kind.marks, MARK_FILE))


def note_name(folder: Path, name: str) -> None:
    """Note that a file of this name will be written to a temporary folder (see `noted_names`)."""
    with (folder / MARK_FILE).open("a", encoding="utf-8") as mark:
        mark.write(f"{name}\n")


def noted_names(folder: Path) -> Collection[str]:
    """The names that were noted in a temporary folder; a Kind's `named`."""
    return set(_mark(folder)[2:])


def _mark(folder: Path) -> list[str]:
    """The lines of a folder's mark; none where it has none."""
    mark = folder / MARK_FILE
    if mark.is_symlink() or not mark.is_file():
        return []
    return mark.read_text(encoding="utf-8", errors="replace").splitlines()


def _is_users(folder: Path) -> bool:
    """Whether a folder has a name of ours, and is this user's."""
    status = folder.lstat()
    is_users = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return is_users and _NAME.fullmatch(folder.name) is not None


def _remove_abandoned(parent: Path, kind: Kind) -> None:
    """Delete the temporary folders of a kind whose processes have ended; with strangers they stay.

    A process that was killed before it wrote its mark is known by its number.
    """
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        with suppress(FileNotFoundError):  # another run deletes it too
            if find_stranger(folder, _UNMARKED) is None and not _is_running(folder):
                discard(folder, _UNMARKED)
            elif find_stranger(folder, kind) is None:
                with lock_abandoned(folder / MARK_FILE) as abandoned:
                    if abandoned:
                        discard(folder, kind)


def _is_running(folder: Path) -> bool:
    """Whether a process has the number that a temporary folder's name holds."""
    name = _NAME.fullmatch(folder.name)
    try:
        os.kill(int(name[1]) if name else 0, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _is_unmarked(folder: Path) -> bool:
    """Whether a folder has no mark yet."""
    return _is_users(folder) and not _mark(folder)


_UNMARKED = Kind("a new folder", (MARK_FILE,), is_ours=_is_unmarked)
