"""Pictures and pages bear this program's name: a later one replaces nothing of someone else's."""

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
DPI = 130
_COLOURS = 128  # shades of the edges of letters included
PAGE_MARK = '<meta name="generator" content="mint-mlx">'  # near a page's beginning
_PAGE_START = 2000


def write_picture(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as .png, .pdf or .svg, whole or not at all."""
    form = path.suffix[1:]
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=DPI, format=form, metadata={_KEYS[path.suffix]: NAME})
        if form == "png":
            _reduce_colours(partial)


def _reduce_colours(path: Path) -> None:
    """Store a PNG with a palette: drawings have few colours, and take a third of the bytes then."""
    from PIL import Image, PngImagePlugin

    with Image.open(path) as picture:
        reduced = picture.convert("RGB").quantize(_COLOURS)
    mark = PngImagePlugin.PngInfo()
    mark.add_text(_KEYS[".png"], NAME)
    reduced.save(path, format="PNG", optimize=True, pnginfo=mark, dpi=(DPI, DPI))


def is_picture(path: Path) -> bool:
    """Whether a file is a picture that `write_picture` wrote."""
    if path.is_symlink() or not path.is_file() or path.suffix not in _STORED:
        return False
    with path.open("rb") as file:
        return _STORED[path.suffix] in file.read(_BYTES)


def is_page(path: Path) -> bool:
    """Whether a file is a page that this program wrote."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return PAGE_MARK.encode() in file.read(_PAGE_START)
