"""What an interrupted profile measured already: one line of JSON a layer, beside the place of the finished profile."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from .ranks import ranks


def begun(place: Path) -> dict[str, Any]:
    """Curves by layer that earlier runs left; a line that was cut short counts as none."""
    found: dict[str, Any] = {}
    for file in _files(place):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found |= json.loads(line)
            except (ValueError, TypeError):
                continue
    return found


def add(place: Path, path: str, curve: Any) -> None:
    """Note one layer's curve; each rank has a file of its own.

    Where that can't be done the work goes on: `get_profile` says so when it comes to keeping the whole profile.
    """
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_name(f"{place.name}.begun-{ranks().rank}").open("a", encoding="utf-8") as file:
            file.write(json.dumps({path: curve}) + "\n")


def clear(place: Path) -> None:
    """Forget all of it: the profile is finished."""
    for file in _files(place):
        file.unlink(missing_ok=True)


def _files(place: Path) -> list[Path]:
    return sorted(place.parent.glob(f"{place.name}.begun-*")) if place.parent.is_dir() else []
