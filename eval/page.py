"""A self-contained page: sections of text, pictures and tables in one HTML file.

It opens from disk, loads nothing, and follows the reader's light or dark setting. Whatever stands
in it (names, tokens, reasons) may come from strangers: jinja2 escapes it, and control characters
are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..base.files import PAGE_FILE, write_text
from ..base.pictures import PAGE_MARK
from ..base.printable import printable
from ..base.targets import check_page_folder
from .pictures.style import COLOURS, DARK, Picture, draw_to, to_svg

TEMPLATE = "report_page.html"
MOST_BYTES = 1_000_000
MOST_LINES = 100  # of a table
MOST_CHARACTERS = 1200  # of a text


@dataclass(frozen=True)
class Passage:
    """A cell with a marked word in its context."""

    before: str
    marked: str
    after: str


Cell: TypeAlias = "str | Passage"


@dataclass(frozen=True)
class Table:
    """A table of a section.

    Attributes:
        caption: what it shows.
        columns: names; those of figures are set to the right.
        lines: cells; the first of a line is its head.
        folded: whether a reader opens it by a click.
    """

    caption: str
    columns: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    folded: bool = False

    @property
    def shown(self) -> Sequence[Sequence[Cell]]:
        """The lines that are shown."""
        return self.lines[:MOST_LINES]

    @property
    def more(self) -> int:
        """How many are not."""
        return max(0, len(self.lines) - MOST_LINES)

    def is_figures(self, column: int) -> bool:
        """Whether a column holds figures alone."""
        cells = [line[column] for line in self.lines]
        return column > 0 and all(
            isinstance(cell, str) and (cell in ("", "-") or cell[0].isdigit() or cell[0] in "+-~<")
            for cell in cells
        )


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        name: its anchor.
        title: its heading.
        paragraphs: of text.
        pictures: in order.
        tables: in order.
        items: names with values.
    """

    name: str
    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    items: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: of the page.
        lead: one sentence below it.
        facts: names with values, at the top.
        sections: in order.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        """All pictures."""
        return [picture for section in self.sections for picture in section.pictures]


def write_page(page: Page, folder: Path) -> list[Path]:
    """Write `report.html` and each picture as PNG into a folder; returns their paths.

    Raises:
        MintError: the folder can't be written to, or holds such a file of someone else.
    """
    names = [f"{picture.name}.png" for picture in page.pictures]
    check_page_folder(folder, names)
    text = render(page)
    for picture, name in zip(page.pictures, names, strict=True):
        draw_to(picture, folder / name)
    write_text(folder / PAGE_FILE, text)
    return [folder / name for name in (PAGE_FILE, *names)]


def render(page: Page) -> str:
    """The page's HTML, below MOST_BYTES: a model of many layers has no pictures for phones."""
    text = _render(page, narrow=True)
    return text if len(text.encode()) < MOST_BYTES else _render(page, narrow=False)


def _render(page: Page, narrow: bool) -> str:
    """The page's HTML, with pictures for narrow screens or without."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        parts = [escape(_cleaned(part)) for part in text.split("`")]
        return Markup("").join(
            Markup("<code>{}</code>").format(part) if i % 2 else part
            for i, part in enumerate(parts)
        )

    def svg(picture: Picture, for_narrow: bool) -> Markup:
        return Markup(to_svg(picture, for_narrow))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    return environment.get_template(TEMPLATE).render(
        page=page,
        svg=svg,
        narrow=narrow,
        mark=Markup(PAGE_MARK),
        light=COLOURS,
        dark=DARK,
        is_passage=lambda cell: isinstance(cell, Passage),
    )


def _cleaned(value: Any) -> Any:
    """A text of anyone without control characters, and not endless; markup of ours stays."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    if len(value) > MOST_CHARACTERS:
        value = value[:MOST_CHARACTERS] + " ..."
    return printable(value)
