"""What an interrupted run has done already, beside the place of what it was to make.

Of a profile one line of JSON a layer; of a sensitivity the text that the model has written.
"""

from __future__ import annotations

import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..base.distributed import ranks
from ..base.files import atomic_write
from ..base.versions import stamp


def read_curves(place: Path) -> dict[str, Any]:
    """Curves by layer that earlier runs of this version left; a line that was cut short counts as
    none.
    """
    found: dict[str, Any] = {}
    for file in _files(place, stamp()):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found |= json.loads(line)
            except (ValueError, TypeError):
                continue
    return found


def append_curve(place: Path, path: str, curve: Any) -> None:
    """Note one layer's curve; each rank has a file of its own.

    Where that can't be done the work goes on: `get_profile` says so when it comes to keeping the
    whole profile."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_name(f"{place.name}.begun-{stamp()}-{ranks().rank}").open(
            "a", encoding="utf-8"
        ) as file:
            file.write(json.dumps({path: curve}) + "\n")


def read_tokens(place: Path, kind: str) -> tuple[np.ndarray, int] | None:
    """The model's own text of a kind as earlier runs left it, and how many of its parts or passes
    were finished.
    """
    try:
        with np.load(_tokens_file(place, kind)) as found:
            return found["tokens"], int(found["done"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write_tokens(place: Path, kind: str, tokens: np.ndarray, done: int) -> None:
    """Note the model's own text after so many parts or passes."""
    file = _tokens_file(place, kind)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial, partial.open("wb") as out:
            np.savez(out, tokens=tokens, done=done)


def clear(place: Path) -> None:
    """Forget all of it: what was to be made is finished."""
    for file in _files(place):
        file.unlink(missing_ok=True)


def _tokens_file(place: Path, kind: str) -> Path:
    return place.with_name(f"{place.name}.begun-{stamp()}-{kind}")


def _files(place: Path, stamp: str = "") -> list[Path]:
    return (
        sorted(place.parent.glob(f"{place.name}.begun-{stamp}*")) if place.parent.is_dir() else []
    )
