"""Versions of this program and of what its results depend on, for plans and model cards."""

from __future__ import annotations

from importlib.metadata import version


def versions() -> dict[str, str]:
    """Installed versions by package name."""
    return {name: version(name) for name in ("mint-mlx", "mlx", "mlx-lm")}
