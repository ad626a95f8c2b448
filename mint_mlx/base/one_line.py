"""What a result looks like when it is printed: one line, in a notebook as in a terminal."""

from __future__ import annotations

WIDTH = 200  # characters at most


def one_line(value: object, *facts: str) -> str:
    """`Kind(fact, fact, ...)` for a `__repr__`, cut to WIDTH characters."""
    text = " ".join(f"{type(value).__name__}({', '.join(facts)})".split())
    return text if len(text) < WIDTH else f"{text[: WIDTH - 5]}...)"
