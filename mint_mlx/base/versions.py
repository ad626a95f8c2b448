"""Versions of this program and of what its results depend on, for plans and model cards."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Installed versions by package name."""
    return {name: version(name) for name in ("mint-mlx", "mlx", "mlx-lm")}


@cache  # asked for a layer: looking three packages up takes 7 ms
def stamp() -> str:
    """The same in eight digits, for the names of unfinished work: another version doesn't go on
    with it.
    """
    return hashlib.blake2b(repr(versions()).encode(), digest_size=4).hexdigest()
