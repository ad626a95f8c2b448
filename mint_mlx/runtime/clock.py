"""A product that is timed beside others: a machine that slows down slows both.

A core that others share changes its speed by half, for milliseconds or for minutes. So times are
taken in ticks: over what one small product takes just before and just after (Bulej et al., 2020,
compare programs so, by duets). A table's seconds are ticks times their middle length. A tick is
told from a chain of such products, as long as a machine needs to tell it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..base.quant_config import QuantConfig
from .random_weights import random_codes

SIDE = 256  # rows and columns of the product
CONFIG = QuantConfig(4, 64)
LEAST = 0.002  # seconds of a chain, about
LONGEST = 256  # products of a chain at most
SHARE = 0.2  # of what some work takes, that chains before it take, and chains after it
MOST = 32  # chains before it at most


@dataclass(frozen=True)
class Clock:
    """Ticks so far.

    Attributes:
        weight: of the product: codes, scales and biases.
        products: of a chain, each with what the one before gave.
        ticks: seconds of a product, of each chain so far.
    """

    weight: tuple[mx.array, mx.array, mx.array]
    products: int
    ticks: list[float]


def start_clock() -> Clock:
    """A clock whose chains are as long as this machine needs."""
    weight = random_codes((SIDE,), SIDE, CONFIG, SIDE**-0.5, mx.bfloat16)
    once = Clock((weight["weight"], weight["scales"], weight["biases"]), 1, [])
    mx.eval(once.weight)
    shortest = min(_tick(once) for _ in range(5))
    return Clock(once.weight, max(1, min(LONGEST, round(LEAST / shortest))), [])


def timed(clock: Clock, work: Callable[[], float], expected: float = 0.0) -> tuple[float, float]:
    """What some work takes.

    Args:
        clock: whose ticks are taken before and after it.
        work: returns its seconds.
        expected: seconds that it takes, about; longer work has more chains beside it.

    Returns:
        Seconds, and ticks.
    """
    count = max(1, min(MOST, round(SHARE * expected / LEAST)))
    before = sum(_tick(clock) for _ in range(count))
    seconds = work()
    after = sum(_tick(clock) for _ in range(count))
    return seconds, 2 * count * seconds / (before + after)


def tick_seconds(clock: Clock) -> float:
    """The mean of the middle half of all ticks: no single stop of the machine counts."""
    ticks = np.sort(clock.ticks)
    rest = len(ticks) // 4
    return float(ticks[rest : len(ticks) - rest].mean())


def _tick(clock: Clock) -> float:
    """Seconds of a product, from one chain."""
    y = mx.ones((1, SIDE), mx.bfloat16)
    mx.eval(y)
    started = time.perf_counter()
    for _ in range(clock.products):
        y = mx.quantized_matmul(y, *clock.weight, group_size=CONFIG.group_size, bits=CONFIG.bits)
    mx.eval(y)
    clock.ticks.append((time.perf_counter() - started) / clock.products)
    return clock.ticks[-1]
