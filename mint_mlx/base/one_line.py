"""What a result looks like when it is printed: one line, in a notebook as in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from .printable import printable

WIDTH = 200  # characters at most
SHOWN = 8  # names of many


def listed(names: Sequence[str], most: int = SHOWN) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(value: object, *facts: str) -> str:
    """`Kind(fact, fact, ...)` for a `__repr__`, cut to WIDTH characters."""
    text = " ".join(f"{type(value).__name__}({', '.join(facts)})".split())
    text = printable(text)
    return text if len(text) < WIDTH else f"{text[: WIDTH - 5]}...)"
