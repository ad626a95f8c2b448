"""The one place that deletes: only what this program can prove it wrote.

A folder is deleted when it bears a mark of ours and all in it has a name that we give. Anything
else in it is a stranger, a link or a subfolder included: then nothing of the folder is deleted,
and the refusal names the stranger. (macOS puts `.DS_Store` everywhere: it is no stranger.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .errors import MintError
from .side_files import matches

DESKTOP = ".DS_Store"
PARTIAL = ".part"  # in the name of a file that isn't complete
UNFINISHED = "." + "[0-9a-f]" * 32 + PARTIAL + "*"  # what files.atomic_write leaves when killed


class Stranger(MintError):
    """Something that this program did not write stands where it would delete."""


def _bears_a_mark(folder: Path) -> bool:
    """Of a folder inside one that bears the mark, or one that this very process made."""
    return True


@dataclass(frozen=True)
class Kind:
    """A kind of folder that this program writes.

    Attributes:
        what: it is, for messages.
        files: patterns of the names that its files have.
        folders: its subfolders, by pattern.
        is_ours: whether a folder bears the mark of this kind: a file with our content.
        marks: the files that `is_ours` looks at, which are deleted last: a kill leaves them.
        named: further files that a folder's own content names.
    """

    what: str
    files: tuple[str, ...]
    folders: Mapping[str, Kind] = field(default_factory=dict)
    is_ours: Callable[[Path], bool] = _bears_a_mark
    marks: tuple[str, ...] = ()
    named: Callable[[Path], Collection[str]] = lambda folder: ()


def find_stranger(folder: Path, kind: Kind) -> Path | None:
    """The first thing in a folder that this program did not write; the folder itself if it isn't
    one of this kind; None where there is none."""
    if folder.is_symlink() or not folder.is_dir() or not kind.is_ours(folder):
        return folder
    names = kind.named(folder)
    for path in sorted(folder.iterdir()):
        inner = _inner(kind, path)
        if inner is not None:
            stranger = find_stranger(path, inner)
            if stranger is not None:
                return stranger
        elif not _is_known_file(path, kind, names):
            return path
    return None


def _inner(kind: Kind, path: Path) -> Kind | None:
    """The kind of a subfolder; None where it is no folder, or no known one."""
    if path.is_symlink() or not path.is_dir():
        return None
    return next((k for pattern, k in kind.folders.items() if matches(path.name, (pattern,))), None)


def _is_known_file(path: Path, kind: Kind, names: Collection[str]) -> bool:
    """Whether it is a plain file with a name that this program gives."""
    if path.is_symlink() or not path.is_file():
        return False
    return path.name == DESKTOP or path.name in names or matches(path.name, kind.files)


def known_files(folder: Path, kind: Kind) -> list[str]:
    """The files of a folder that this program wrote, as paths within it, in order."""
    names = kind.named(folder)
    files = []
    for path in sorted(folder.iterdir()):
        inner = _inner(kind, path)
        if inner is not None:
            files += [f"{path.name}/{name}" for name in known_files(path, inner)]
        elif path.name != DESKTOP and _is_known_file(path, kind, names):
            files.append(path.name)
    return files


def check_removable(folder: Path, kind: Kind, instead: str = "") -> None:
    """Refuse a folder that holds anything that this program did not write.

    Args:
        folder: that would be deleted.
        kind: it should be of.
        instead: what a user may do in place of moving the stranger away.

    Raises:
        Stranger: naming it.
    """
    stranger = find_stranger(folder, kind)
    if stranger == folder:
        raise Stranger(
            f"{folder} is not {kind.what} that mint-mlx wrote, so it is not deleted: move it away"
            f"{instead}"
        )
    if stranger is not None:
        raise Stranger(
            f"{folder} holds {stranger.relative_to(folder)}, which mint-mlx did not write, so it "
            f"is not deleted: move that file or folder away{instead}"
        )


def remove_folder(folder: Path, kind: Kind) -> None:
    """Delete a folder of ours.

    Raises:
        Stranger: it holds anything else; nothing was deleted then.
    """
    check_removable(folder, kind)
    discard(folder, kind)
    if folder.is_dir():  # something appeared meanwhile, and stays
        check_removable(folder, kind)


def empty_folder(folder: Path, kind: Kind, keep: str) -> None:
    """Delete all in a folder of ours but the file `keep`.

    Raises:
        Stranger: it holds anything else; nothing was deleted then.
    """
    check_removable(folder, kind)
    _delete(folder, kind, keep)


def discard(folder: Path, kind: Kind) -> None:
    """Delete what of a folder is ours, and the folder where nothing else remains.

    For folders that this process made itself, and for those that were checked.
    """
    with suppress(FileNotFoundError):  # another run deletes it too
        _delete(folder, kind)
        if not any(folder.iterdir()):
            folder.rmdir()


def _delete(folder: Path, kind: Kind, keep: str = "") -> None:
    """Delete the files and subfolders of ours in a folder."""
    if folder.is_symlink() or not folder.is_dir():
        return
    names = kind.named(folder)

    # What proves that the rest is ours goes last.
    paths = sorted(folder.iterdir(), key=lambda p: (p.name in kind.marks, p.name not in names))
    for path in paths:
        inner = _inner(kind, path)
        if inner is not None and inner.is_ours(path):
            discard(path, inner)
        elif path.name != keep and _is_known_file(path, kind, names):
            path.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Delete a plain file that the caller knows to be ours; a link or a folder of its name stays.

    The caller's proof is a name that only this program gives, in a folder that bears its mark.
    """
    if not path.is_symlink() and path.is_file():
        path.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Rename a finished file or folder to its own name; what has that name already must be ours."""
    os.replace(path, target)
