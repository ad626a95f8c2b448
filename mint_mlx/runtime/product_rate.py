"""How fast this machine multiplies matrices, for estimates of time."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

TIMES = 5  # of which the fastest counts: others wait for something else


def product_rate() -> float:
    """Operations per second of a float32 matrix product."""
    a = mx.random.normal((1024, 1024))
    mx.eval(a @ a)
    return 2 * 1024**3 / shortest(lambda: mx.eval(a @ a))


def shortest(work: Callable[[], object]) -> float:
    """Seconds of some work, which returns when it is done: the fewest of TIMES."""

    def seconds() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(seconds() for _ in range(TIMES))
