"""Replaces methods of a model's classes for a moment: that is how a model is watched without
touching its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

Call = Callable[..., Any]


@contextmanager
def wrapped(kind: Any, wrap: Callable[[Call], Call], method: str = "__call__") -> Iterator[None]:
    """Replace a class's `__call__` (or another method, or a function of a Python module) for a
    moment.
    """
    call = getattr(kind, method)
    setattr(kind, method, wrap(call))
    try:
        yield
    finally:
        setattr(kind, method, call)


@contextmanager
def wrapped_all(kinds: set[type], wrap: Callable[[Call], Call]) -> Iterator[None]:
    """Replace the `__call__` of several classes for a moment."""
    if not kinds:
        yield
        return
    first, *rest = kinds
    with wrapped(first, wrap), wrapped_all(set(rest), wrap):
        yield


def returning(trunk: nn.Module, value: Any) -> Callable[[Call], Call]:
    """A wrapper that makes one module return a value that is known already."""

    def wrap(call: Call) -> Call:
        return lambda self, *args, **kwargs: value if self is trunk else call(self, *args, **kwargs)

    return wrap
