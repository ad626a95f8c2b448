"""Versions of this program and of what its results depend on, for plans and model cards."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Installed versions by package name."""
    return {name: version(name) for name in ("mint-mlx", "mlx", "mlx-lm")}


@cache  # called for every layer, and looking three packages up takes 7 ms
def stamp() -> str:
    """A hash of `versions` in eight digits: unfinished work of another version is not resumed."""
    return hashlib.blake2b(repr(versions()).encode(), digest_size=4).hexdigest()
