"""How pictures look: colours that colour-blind readers tell apart, sizes in pixels, PNG and SVG.

The SVG is for a page: its colours are the page's CSS variables, so one picture serves light and
dark, and its text is text.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ...base.pictures import write_picture
from ...base.printable import printable

WIDE, NARROW = 960, 356  # pixels: of a page on a desktop, and on a phone
DPI = 72  # at which a point is a pixel

# Drawn in a light page's colours; `to_svg` writes the names in their place.
COLOURS = {
    "ink": "#1b1d21",
    "muted": "#5c6169",
    "line": "#c9cdd3",
    "paper": "#ffffff",
    "blue": "#0072b2",  # Okabe and Ito's palette, "Color Universal Design", 2008
    "orange": "#b85200",
    "green": "#007a5a",
    "pink": "#a8497f",
}
DARK = {
    "ink": "#e9eaec",
    "muted": "#a4aab3",
    "line": "#434850",
    "paper": "#16181b",
    "blue": "#56b4e9",
    "orange": "#f0953f",
    "green": "#3fc59b",
    "pink": "#e08fc0",
}
INK, MUTED, LINE, PAPER = (COLOURS[name] for name in ("ink", "muted", "line", "paper"))
BLUE, ORANGE, GREEN, PINK = (COLOURS[name] for name in ("blue", "orange", "green", "pink"))


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn when it is needed.

    Attributes:
        name: of its file, without the ending.
        alt: what it shows, for those who don't see it.
        draw: returns a figure of matplotlib, for a narrow page where it is given True.
    """

    name: str
    alt: str
    draw: Callable[[bool], Any]


def new_figure(narrow: bool, height: int, free: bool = False) -> Any:
    """An empty figure of a page's width.

    Args:
        narrow: for a phone.
        height: in pixels.
        free: whether what is drawn has places of its own, which matplotlib leaves alone.
    """
    from matplotlib.figure import Figure

    width = NARROW if narrow else WIDE
    return Figure(
        figsize=(width / DPI, height / DPI), layout=None if free else "constrained", facecolor=PAPER
    )


def plain(text: str) -> str:
    """A stranger's text as it may stand in a picture: without control characters."""
    return printable(text)


def percent(value: float, position: int) -> str:
    """A share as a tick's label."""
    return f"{value * 100:.3g}%"


def draw_to(picture: Picture, path: Path) -> None:
    """Write a picture as PNG (or PDF, SVG, by the path's ending), in a light page's colours."""
    with _style(narrow=False):
        write_picture(picture.draw(False), path)


def to_svg(picture: Picture, narrow: bool) -> str:
    """A picture as an `<svg>` element for a page that defines the colours as CSS variables."""
    buffer = io.StringIO()
    name = f"{picture.name}-{'narrow' if narrow else 'wide'}"
    with _style(narrow, salt=name):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.draw(narrow).savefig(buffer, format="svg", metadata=nothing)

    # Of the file only the element goes into a page, whose parser knows SVG's names.
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    label = escape(printable(picture.alt), quote=True)
    opening = f'<svg class="{_kind(narrow)}" role="img" aria-label="{label}" {box[0]}>'
    text = re.sub(r"^<svg[^>]*>", lambda _: opening, text)

    # Names stand for the page as a whole: those that nothing refers to go, and a style for all.
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', text))
    text = re.sub(r'(<[^>]*?) id="([^"]+)"', lambda m: m[0] if m[2] in used else m[1], text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = _compact(text)

    # Colours follow the page, and so does the font.
    for colour, value in COLOURS.items():
        text = re.sub(rf'(fill|stroke)="{value}"', rf'style="\1: {value}"', text)
        text = text.replace(value, f"var(--{colour})")
    text = re.sub(r"font: ([^;\"]*?) ?'DejaVu Sans'[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: '[^;\"]*; ?", "", text)
    return _share_styles(text, name)


def _compact(text: str) -> str:
    """An SVG in fewer bytes: a plan of a large model has thousands of bars."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' d="([^"]*)"', lambda m: f' d="{_path(m[1])}"', text)
    text = re.sub(r">\s+<", "><", text)
    while (shorter := re.sub(r"<g>(<(?:path|text|use)[^>]*?/>)</g>", r"\1", text)) != text:
        text = shorter
    text = re.sub(r' (x|y)="(\d+\.\d{3,})"', lambda m: f' {m[1]}="{float(m[2]):.2f}"', text)
    return re.sub(r'<g></g>|; stroke-linejoin: miter| transform="rotate\(-0 [^"]*"', "", text)


def _share_styles(text: str, name: str) -> str:
    """An SVG whose repeated styles are written once, as classes that bear its name."""
    counts = Counter(re.findall(r' style="([^"]*)"', text))
    classes = {style: f"{name}-{i}" for i, (style, count) in enumerate(counts.items()) if count > 2}
    rules = "".join(f".{label} {{{style}}}" for style, label in classes.items())

    def short(match: re.Match[str]) -> str:
        label = classes.get(match[1])
        return match[0] if label is None else f' class="{label}"'

    text = re.sub(r' style="([^"]*)"', short, text)
    return text.replace(">", f"><style>{rules}</style>", 1)


def _path(data: str) -> str:
    """A path's data with as few digits and spaces as a pixel needs."""
    data = re.sub(r"\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), data)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", data).strip()


def _kind(narrow: bool) -> str:
    """The class of a picture's element, by which a page shows one of the two."""
    return "narrow" if narrow else "wide"


@contextmanager
def _style(narrow: bool, salt: str = "") -> Iterator[None]:
    """Settings of matplotlib while a picture is drawn and written."""
    import matplotlib

    settings: dict[str, Any] = {
        "font.family": ["DejaVu Sans"],
        "font.size": 10 if narrow else 11,
        "legend.fontsize": 9.5 if narrow else 10.5,
        "legend.frameon": False,
        "axes.titlesize": 11 if narrow else 13,
        "axes.titlelocation": "left",
        "axes.edgecolor": MUTED,
        "axes.facecolor": PAPER,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.7,
        "savefig.facecolor": PAPER,
        "svg.fonttype": "none",
        "svg.hashsalt": f"mint-mlx {salt}",
        "text.color": INK,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "xtick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.color": MUTED,
        "ytick.labelcolor": INK,
    }
    with matplotlib.rc_context(settings):
        yield
