"""Times products of quantized layers on this machine: launched in chains, from weights that rotate.

Each product waits for the one before, as a model's do. Weights are random codes: values don't
change a time. They are parts of one large array, so that none is made anew, and rotate over it, so
that a weight is no warmer in the processor's cache than in a model that reads all its layers before
it reads one again. Times are in ticks (clock.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.quant_config import KEEP, QuantConfig
from ..checkpoint.layers import MLX_DTYPES
from .clock import Clock, timed
from .random_weights import Pool, constant_part, random_part
from .speed_table import LayerKind, Timing

WORKING_SET = 128_000_000  # bytes over which weights rotate at most: more than any cache holds
COPIES = 32  # of one weight at most
SORTED = 64  # rows from which on mlx-lm sorts them by expert
ROUND = 0.008  # seconds that a chain takes at least
ROUNDS = (3, 15)  # how many chains are timed, at least and at most
PRECISE = 0.01  # relative standard error of the median from which on no more chains are timed
PROBE = 8  # rows of the weight that are timed first, to tell how long more take
SPREAD = 1e-3  # root mean square of weights

Weights = tuple[Any, ...]  # arrays: a weight, or codes with scales and biases


@dataclass(frozen=True)
class Product:
    """One product to time.

    Attributes:
        kind: of the layer.
        config: of its weight.
        batch: tokens at once.
    """

    kind: LayerKind
    config: QuantConfig
    batch: int


@dataclass(frozen=True)
class Bench:
    """What products are timed with.

    Attributes:
        clock: is timed beside each.
        working_set: bytes that the model reads for one token, at about the usual configuration.
        pool: arrays that weights are parts of.
        links: ticks of what ties a product to the next, by what it reads and the chain's length.
    """

    clock: Clock
    working_set: float
    pool: Pool
    links: dict[tuple[LayerKind, int, int], float]


def time_product(product: Product, seconds: float, bench: Bench) -> list[float]:
    """Ticks that one product takes, of each chain that was timed.

    A product that takes long is timed on some of its weight's rows, which its time is proportional
    to where it does.

    Args:
        product: what to time.
        seconds: that timing it may take, about.
        bench: what it is timed with.

    Returns:
        Nothing where MLX has no such product on this device.
    """
    started = time.perf_counter()
    rows = product.kind.shape[1]
    try:
        tried, single, ticks = _try_rows(product, bench)
    except (ValueError, RuntimeError):  # e.g. products of 16-bit experts on a CPU
        return []
    if single > seconds:
        return [ticks * rows / tried]

    # Chains over several copies of the weight, until their median is known well enough.
    read = min(bench.working_set, WORKING_SET)
    copies = max(1, min(COPIES, math.ceil(read / _bytes(product, tried))))
    weights = [_weights(product, tried, bench.pool, copy) for copy in range(copies)]
    launches = max(1, min(64, math.ceil(ROUND / single)))
    runs: list[float] = []
    while len(runs) < ROUNDS[0] or (
        len(runs) < ROUNDS[1] and time.perf_counter() - started < seconds and _error(runs) > PRECISE
    ):
        first = len(runs) * launches
        turn = [weights[(first + i) % copies] for i in range(launches)]
        runs.append(_chain_ticks(product, turn, bench)[1] / launches)
    link = _link_ticks(product, launches, bench)
    return [max(run - link, 0.1 * run) * rows / tried for run in runs]


def timing(runs: Sequence[float]) -> Timing:
    """The median of some runs, with the relative half of their middle half."""
    low, middle, high = np.quantile(runs, (0.25, 0.5, 0.75))
    return Timing(float(middle), float((high - low) / 2 / middle))


def _error(runs: Sequence[float]) -> float:
    """The relative standard error of a median: 1.25 times that of a mean, from the middle half."""
    return 1.25 * timing(runs).spread / 0.674 / math.sqrt(len(runs))


def _try_rows(product: Product, bench: Bench) -> tuple[int, float, float]:
    """More and more rows, until one product takes as long as a chain shall, or has all of them.

    Returns:
        How many, and the seconds and ticks of a product with them.
    """
    rows = product.kind.shape[1]
    tried = min(rows, PROBE)
    while True:
        weights = [_weights(product, tried, bench.pool)]
        seconds, ticks = _chain_ticks(product, weights, bench)
        if tried == rows or seconds > ROUND / 2:
            return tried, seconds, ticks
        tried = min(rows, int(tried * max(2, ROUND / seconds)) // 8 * 8)


def _bytes(product: Product, rows: int) -> float:
    """Bytes of a weight with so many rows, about."""
    config = product.config
    experts, _, columns = product.kind.shape
    scales = 32 / config.group_size if config.mode == "affine" else 0.5
    return experts * rows * columns * (16 if config == KEEP else config.bits + scales) / 8


def _weights(product: Product, rows: int, pool: Pool, copy: int = 0) -> Weights:
    """A weight (rows, columns), experts or heads first; products of it are small.

    Args:
        product: whose weight it is.
        rows: how many of its rows.
        pool: the arrays that it is a part of.
        copy: which of several.
    """
    kind, config = product.kind, product.config
    experts, _, columns = kind.shape
    lead = (rows,) if kind.kind == "linear" else (experts, rows)
    dtype = getattr(mx, MLX_DTYPES[kind.dtype])
    if config == KEEP:
        weight: Weights = (random_part(pool, dtype, (*lead, columns), copy),)
    else:
        # Scales that aren't affine are bytes: 2^-10 as an exponent, or about .02 in e4m3.
        words = random_part(pool, mx.uint32, (*lead, columns * config.bits // 32), copy)
        groups = (*lead, columns // config.group_size)
        code = 13 if config.mode == "nvfp4" else 117
        value, dtype = (SPREAD, dtype) if config.mode == "affine" else (code, mx.uint8)
        scales = constant_part(pool, value, dtype, groups, copy)
        weight = (words, scales, scales) if config.mode == "affine" else (words, scales)
    mx.eval(weight)
    return weight


def _inputs(product: Product) -> tuple[mx.array, mx.array | None]:
    """What a product reads, and the expert of each row where there are experts."""
    kind = product.kind
    dtype = getattr(mx, MLX_DTYPES[kind.dtype])
    experts, _, columns = kind.shape
    if kind.kind == "linear":
        return mx.random.normal((1, product.batch, columns)).astype(dtype), None
    if kind.kind == "multi-linear":
        return mx.random.normal((1, experts, product.batch, columns)).astype(dtype), None
    rng = np.random.default_rng()
    chosen = [rng.permutation(experts)[: kind.active] for _ in range(product.batch)]
    indices = np.concatenate(chosen).astype(np.uint32)
    if indices.size >= SORTED:
        indices.sort()
    x = mx.random.normal((indices.size, 1, columns)).astype(dtype)
    return x, mx.array(indices)


def _multiply(product: Product, x: mx.array, experts: mx.array | None, weight: Weights) -> mx.array:
    """One product, as mlx-lm's layers compute it."""
    config = product.config
    sorted_rows = experts is not None and experts.size >= SORTED
    if config == KEEP:
        transposed = weight[0].swapaxes(-1, -2)
        if experts is None:
            return x @ transposed
        return mx.gather_mm(x, transposed, rhs_indices=experts, sorted_indices=sorted_rows)
    codes, scales = weight[:2]
    biases = weight[2] if len(weight) > 2 else None
    options = _format(config)
    if experts is None:
        return mx.quantized_matmul(x, codes, scales, biases, **options)
    options |= {"rhs_indices": experts, "sorted_indices": sorted_rows}
    return mx.gather_qmm(x, codes, scales, biases, **options)


def _format(config: QuantConfig) -> dict[str, Any]:
    """The options that say how a weight is quantized."""
    return {"group_size": config.group_size, "bits": config.bits, "mode": config.mode}


def _chain_ticks(product: Product, weights: Sequence[Weights], bench: Bench) -> tuple[float, float]:
    """Seconds and ticks of a chain of products with these weights."""
    return timed(bench.clock, partial(_chain_seconds, product, weights))


def _chain_seconds(product: Product, weights: Sequence[Weights]) -> float:
    """Seconds of a chain of products with these; each reads something of the one before."""
    inputs = [_inputs(product) for _ in weights]
    x, _ = inputs[0]
    mx.eval(inputs)
    y = mx.zeros((1,), x.dtype)
    for (read, experts), weight in zip(inputs, weights, strict=True):
        y = _multiply(product, _linked(read, y), experts, weight)
    return _run(y)


def _link_ticks(product: Product, launches: int, bench: Bench) -> float:
    """Ticks of what ties one product to the next, which isn't part of it."""
    key = (replace(product.kind, shape=(1, 1, product.kind.shape[-1])), product.batch, launches)
    if key not in bench.links:
        inputs = [_inputs(product)[0] for _ in range(launches)]
        mx.eval(inputs)

        def link() -> float:
            y = mx.zeros((1,), inputs[0].dtype)
            for read in inputs:
                y = _linked(read, y)
            return _run(y)

        bench.links[key] = min(timed(bench.clock, link)[1] for _ in range(3)) / launches
    return bench.links[key]


def _linked(x: mx.array, before: mx.array) -> mx.array:
    """What a product reads, once another one is done."""
    return mx.maximum(x, before.reshape(-1)[:1])


def _run(y: mx.array) -> float:
    """Seconds of computing an array whose graph is built."""
    started = time.perf_counter()
    mx.eval(y)
    return time.perf_counter() - started
