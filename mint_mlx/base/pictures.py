"""Pictures bear this program's name, so that a later one replaces no picture of someone else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import atomic_write

NAME = "mint-mlx"
_KEYS = {".png": "Software", ".pdf": "Creator", ".svg": "Creator"}  # of matplotlib's metadata
_STORED = {
    ".png": b"Software\0mint-mlx",
    ".pdf": b"/Creator (mint-mlx)",
    ".svg": b"<dc:title>mint-mlx</dc:title>",
}
_BYTES = 16_000_000


def write_picture(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as .png, .pdf or .svg, whole or not at all."""
    with atomic_write(path) as partial:
        figure.savefig(
            partial, dpi=130, format=path.suffix[1:], metadata={_KEYS[path.suffix]: NAME}
        )


def is_picture(path: Path) -> bool:
    """Whether a file is a picture that `write_picture` wrote."""
    if path.is_symlink() or not path.is_file() or path.suffix not in _STORED:
        return False
    with path.open("rb") as file:
        return _STORED[path.suffix] in file.read(_BYTES)
