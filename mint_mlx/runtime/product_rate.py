"""How fast this machine multiplies matrices, for estimates of time."""

from __future__ import annotations

import time

import mlx.core as mx

TIMES = 5  # of which the fastest counts: others wait for something else


def product_rate() -> float:
    """Operations per second of a float32 matrix product."""
    a = mx.random.normal((1024, 1024))
    mx.eval(a @ a)

    def seconds() -> float:
        start = time.perf_counter()
        mx.eval(a @ a)
        return time.perf_counter() - start

    return 2 * 1024**3 / min(seconds() for _ in range(TIMES))
