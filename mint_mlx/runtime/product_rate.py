"""How fast this machine multiplies matrices, for estimates of time."""

from __future__ import annotations

import time

import mlx.core as mx


def product_rate() -> float:
    """Operations per second of a float32 matrix product."""
    a = mx.random.normal((1024, 1024))
    mx.eval(a @ a)
    start = time.perf_counter()
    mx.eval(a @ a)
    return 2 * 1024**3 / (time.perf_counter() - start)
