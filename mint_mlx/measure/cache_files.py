"""How the cache knows its own files again: by the names that it gives, and by what they begin with.

Anything else in its folders is someone else's, and is neither listed nor deleted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from ..base.files import MARK, MARK_FILE, lock_folder
from ..base.folders import CHECKPOINT, UNMARKED, WORK, is_checkpoint, is_work_folder
from ..base.remove import UNFINISHED, Kind, remove_file, remove_folder
from ..base.side_files import matches
from .pass_state import WALK
from .resume import is_notes
from .sensitivity_file import is_sensitivity

MADE = "made.json"  # beside a checkpoint that `compare` built, or in its place
_HEX = "[0-9a-f]"
_FINGERPRINT = rf".*{_HEX}{{16}}-{_HEX}{{16}}"


def _begins(path: Path, pattern: bytes) -> bool:
    """Whether a file's first bytes match a pattern."""
    with path.open("rb") as file:
        return re.match(pattern, file.read(1000), re.DOTALL) is not None


_SEAL = rb'(\{"checksum": "[0-9a-f]{32}", |\{)'  # earlier versions wrote none


# For each kind of file the names, and the proof by content.
_FILES: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "profiles": (
        rf"{_FINGERPRINT}-{_HEX}{{8}}.*\.json",
        lambda path: _begins(path, _SEAL + b'"mint_mlx_profile"'),
    ),
    "sensitivities": (rf"{_FINGERPRINT}-\d+(-twin-{_HEX}{{16}})?\.npz", is_sensitivity),
    "references": (
        rf".*-{_HEX}{{16}}-.*\.safetensors",
        lambda path: _begins(path, rb'.{8}\{"__metadata__":.*"mint_mlx_reference"'),
    ),
    "speeds": (
        rf"{_FINGERPRINT}\.json",
        lambda path: _begins(path, _SEAL + b'"mint_mlx_speed"'),
    ),
    "replies": (
        rf"{_FINGERPRINT}-{_HEX}{{12}}\.json",
        lambda path: _begins(path, rb"\[\[|" + _SEAL + rb'"replies": \[\['),
    ),
}


def is_ours(kind: str, path: Path) -> bool:
    """Whether something in a folder of the cache is this program's, whatever its folder holds."""
    if path.is_symlink():
        return False
    if kind == "compare":
        return path.is_dir() and re.fullmatch(_FINGERPRINT, path.name) is not None
    if kind == "walks":
        return WALK.is_ours(path)
    if not path.is_file():
        return False
    names, proof = _FILES[kind]
    if matches(path.name, (UNFINISHED,)):
        return True
    base, notes, _ = path.name.partition(".begun-")
    if re.fullmatch(names, base) is None:
        return False
    return is_notes(path, base) if notes else proof(path)


def remove(kind: str, path: Path) -> None:
    """Delete an entry of the cache that `is_ours`.

    Raises:
        Stranger: a folder that holds anything else.
    """
    if kind == "compare":
        remove_folder(path, COMPARED)
    elif kind == "walks":
        lock = lock_folder(path)
        if lock is not None:  # else a run has gone on with it
            with lock:
                remove_folder(path, WALK)
    else:
        remove_file(path)


def _is_built(folder: Path) -> bool:
    """Whether `compare` made this folder: by its mark, its note, or the checkpoints inside.

    A run that was killed before it wrote the mark leaves nothing else.
    """
    if all(matches(path.name, (UNFINISHED,)) for path in folder.iterdir()):
        return True
    mark = folder / MARK_FILE
    if mark.is_file() and not mark.is_symlink() and _begins(mark, re.escape(MARK.encode())):
        return True
    note = folder / MADE
    if note.is_file() and not note.is_symlink() and _is_note(note):
        return True
    insides = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return any(is_checkpoint(path) or is_work_folder(path) for path in insides)


def _is_note(path: Path) -> bool:
    """Whether a file is what `compare` notes of a checkpoint that it built."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"seconds", "reason"} <= data.keys()


# Checkpoints of peers, which mlx-lm writes, have the same names but no plan of ours.
BUILT = Kind(
    "a folder",
    (MADE, MARK_FILE, "score[0-9]*.json", UNFINISHED),
    {
        "checkpoint": UNMARKED,
        "unfinished": UNMARKED,
        "unfinished.partial": WORK,
        "unfinished.replaced-[0-9]*": CHECKPOINT,
    },
    _is_built,
    (MARK_FILE, MADE),
)
_LOCK = "." + "*-" + _HEX * 12 + ".lock"
COMPARED = Kind("a folder", (_LOCK,), {"*-" + _HEX * 12: BUILT})
