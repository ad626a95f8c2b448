"""Resume notes of an interrupted run, beside the file that the run makes.

Of a profile they hold one line of JSON for each measured layer; of a sensitivity the tokens that
the model has written. Notes of another version of this program are ignored.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..base import schema
from ..base.array_files import read_npz, write_npz
from ..base.checksum import Damaged, if_sound, parse_checked, warn, with_checksum
from ..base.distributed import ranks
from ..base.files import open_to_append
from ..base.remove import remove_file
from ..base.versions import stamp

_NOTES = re.compile(r"[0-9a-f]{8}-[\w.-]+")  # the stamp, then a rank or a kind of tokens


def read_curves(target: Path) -> dict[str, Any]:
    """The noted curves of all ranks by layer path; damaged lines are skipped.

    Args:
        target: the file that the run makes.
    """
    curves: dict[str, Any] = {}
    for file in _files(target, stamp()):
        lines = if_sound(file, lambda path: path.read_text(encoding="utf-8", errors="replace"))
        for line in (lines or "").splitlines():
            try:
                curves |= parse_checked(line) if line else {}
            except (Damaged, ValueError, TypeError):
                warn(f"a line of {file} was cut short or is damaged: what it held is made anew")
    return curves


def append_curve(target: Path, path: str, curve: Any) -> None:
    """Note one layer's curve, in this rank's own file.

    A note that can't be written is skipped: the user hears of it when the profile itself can't be
    written to the same folder.
    """
    notes = target.with_name(f"{target.name}.begun-{stamp()}-{ranks().rank}")
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_to_append(notes) as file:
            # A line that a kill cut short doesn't spoil the one after it.
            file.write("\n" + with_checksum(json.dumps({path: curve})) + "\n")


def read_tokens(
    target: Path, kind: str, start: np.ndarray, given: np.ndarray
) -> tuple[np.ndarray, int] | None:
    """The noted tokens of a kind, and how many batches or passes were finished; None without notes.

    Args:
        target: the file that the run makes.
        kind: names one of several texts that the run writes.
        start: int32 (windows, length), the tokens that the text began from.
        given: int (windows,), how many of them at the start of each window stay.
    """
    stays = np.arange(start.shape[1]) < given[:, None]

    def read(path: Path) -> tuple[np.ndarray, int]:
        arrays = read_npz(path)
        try:
            # No text has more parts than tokens.
            tokens = schema.check_array(arrays["tokens"], schema.INTEGER, start.shape, 0, 2**31 - 1)
            done = schema.check_array(arrays["done"], schema.INTEGER, (), 0, start.size)
            if not np.array_equal(tokens[stays], start[stays]):
                raise ValueError("another text")
        except (KeyError, ValueError):
            raise Damaged(f"{path} is damaged") from None
        return tokens.astype(np.int32), int(done)

    return if_sound(_tokens_file(target, kind), read)


def write_tokens(target: Path, kind: str, tokens: np.ndarray, done: int) -> None:
    """Note the tokens of a kind after `done` batches or passes; skipped where that fails."""
    with suppress(OSError):
        write_npz(_tokens_file(target, kind), {"tokens": tokens, "done": np.array(done)})


def clear(target: Path) -> None:
    """Delete all notes: the file is made."""
    for file in _files(target):
        remove_file(file)


def clear_surplus(target: Path) -> None:
    """Delete the notes of a run that was killed after it had made the file."""
    with suppress(OSError):  # in a folder that is only read, they stay
        clear(target)


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
