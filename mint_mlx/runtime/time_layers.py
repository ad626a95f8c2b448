"""Times products of quantized layers on this machine: launched in chains, from weights that rotate.

Each product waits for the one before, as a model's do. Weights are random codes: values don't
change a time. They rotate over several copies, so that a weight is no warmer in the processor's
cache than in a model that reads all its layers before it reads one again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.quant_config import KEEP, QuantConfig
from ..checkpoint.layers import MLX_DTYPES
from .random_weights import random_codes, random_dense
from .speed_table import LayerKind, Timing

WORKING_SET = 128_000_000  # bytes over which weights rotate at most: more than any cache holds
COPIES = 32  # of one weight at most
SORTED = 64  # rows from which on mlx-lm sorts them by expert
ROUND = 0.004  # seconds that a chain takes at least
ROUNDS = (3, 15)  # how many chains are timed, at least and at most
PROBE = 64  # rows of the weight that tell how long all of them take
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


def time_product(product: Product, seconds: float, working_set: float) -> list[float]:
    """Seconds that one product takes, of each chain that was timed.

    Args:
        product: what to time.
        seconds: that timing it may take, about. A product that takes too long for it is timed on
            some of its weight's rows, which the time is proportional to.
        working_set: bytes that the model reads for one token, at about this configuration.

    Returns:
        Nothing where MLX has no such product on this device.
    """
    rows = product.kind.shape[1]
    try:
        probed = min(rows, PROBE)
        probe = _chain_seconds(product, probed, 1, [_weights(product, probed)]) / probed
    except (ValueError, RuntimeError):  # e.g. products of 16-bit experts on a CPU
        return []

    # As many rows as leave time for a warm-up and three runs.
    affordable = int(seconds / (ROUNDS[0] + 1) / probe) // 8 * 8
    timed = rows if rows <= max(affordable, 8) else max(affordable, 8)
    size = _bytes(product, timed)
    copies = min(COPIES, max(1, math.ceil(min(working_set, WORKING_SET) / size)))
    weights = [_weights(product, timed) for _ in range(copies)]
    launches = max(1, min(64, math.ceil(ROUND / (probe * timed))))

    # Each copy is touched once before the clock counts.
    started = time.perf_counter()
    for weight in weights[: max(1, int(seconds / 4 / (probe * timed)))]:
        _chain_seconds(product, timed, 1, [weight])
    runs: list[float] = []
    first = 0
    while len(runs) < ROUNDS[0] or (
        len(runs) < ROUNDS[1] and time.perf_counter() - started < seconds
    ):
        turn = [weights[(first + i) % copies] for i in range(launches)]
        runs.append(_chain_seconds(product, timed, launches, turn) / launches)
        first += launches
    link = min(_link_seconds(product, launches) for _ in range(3))
    return [max(run - link, 0.1 * run) * rows / timed for run in runs]


def timing(runs: Sequence[float]) -> Timing:
    """The median of some runs, with the relative half of their middle half."""
    low, middle, high = np.quantile(runs, (0.25, 0.5, 0.75))
    return Timing(float(middle), float((high - low) / 2 / middle))


def _bytes(product: Product, rows: int) -> float:
    """Bytes of a weight with so many rows, about."""
    config = product.config
    experts, _, columns = product.kind.shape
    scales = 32 / config.group_size if config.mode == "affine" else 0.5
    return experts * rows * columns * (16 if config == KEEP else config.bits + scales) / 8


def _weights(product: Product, rows: int) -> Weights:
    """A random weight (rows, columns), experts or heads first; products of it are small."""
    kind, config = product.kind, product.config
    experts, _, columns = kind.shape
    lead = (rows,) if kind.kind == "linear" else (experts, rows)
    dtype = getattr(mx, MLX_DTYPES[kind.dtype])
    if config == KEEP:
        weight: Weights = (random_dense((*lead, columns), SPREAD, dtype),)
    else:
        weight = tuple(random_codes(lead, columns, config, SPREAD, dtype).values())
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


def _chain_seconds(product: Product, rows: int, launches: int, weights: list[Weights]) -> float:
    """Seconds of a chain of products; each reads something of the one before."""
    inputs = [_inputs(product) for _ in range(launches)]
    x, _ = inputs[0]
    mx.eval(inputs)
    y = mx.zeros((1,), x.dtype)
    for (read, experts), weight in zip(inputs, weights, strict=True):
        y = _multiply(product, _linked(read, y), experts, weight)
    return _run(lambda: y)


def _link_seconds(product: Product, launches: int) -> float:
    """Seconds of what ties one product to the next, which isn't part of it."""
    inputs = [_inputs(product)[0] for _ in range(launches)]
    mx.eval(inputs)
    y = mx.zeros((1,), inputs[0].dtype)
    for read in inputs:
        y = _linked(read, y)
    return _run(lambda: y) / launches


def _linked(x: mx.array, before: mx.array) -> mx.array:
    """What a product reads, once another one is done."""
    return mx.maximum(x, before.reshape(-1)[:1])


def _run(result: Callable[[], mx.array]) -> float:
    """Seconds of computing a result whose graph is built."""
    y = result()
    started = time.perf_counter()
    mx.eval(y)
    return time.perf_counter() - started
