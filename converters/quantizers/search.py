"""Searches the range of each group's grid, and undoes what that shrinks: from the weights alone.

`mx.quantize` spreads a grid over all of a group's range. A narrower one clips its largest weights
and rounds all others finer. Several ranges are tried, each with scale and bias refitted by least
squares to the codes that it gives, and the one with the least squared error is taken.

Least squares returns (1 - e) w plus noise, coherent over a layer's rows: at 2 bits gate and up come
out 3 to 4 % too small each, and their product 7 %. Squared errors call that good, the model doesn't
(docs/research-log.md). So each row's scales and biases are stretched in the end, until its product
with the weight is that of the weight with itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import numpy as np

from ...base.quant_config import QuantConfig
from ...base.streams import working
from . import rtn
from .codes import Codes

# Codes (rows, columns), scales and biases (rows, groups).
Grid = tuple[mx.array, mx.array, mx.array]

# Of a group's range, by bits: more of them lose little less (docs/research-log.md).
SHRINKS = {
    2: (1.0, 0.86, 0.72),
    3: (1.0, 0.86, 0.72),
    4: (1.0, 0.92, 0.84),
    5: (1.0, 0.93),
    6: (1.0,),
    8: (1.0,),
}
REFITS = 2  # of scale and bias, for each range
SMALLEST = 1e-37  # numbers below lose digits in float32
CHUNK = 1 << 19  # weights at once: small enough for the CPU's cache


def quantize(weight: mx.array, config: QuantConfig) -> dict[str, mx.array]:
    """Quantize one layer, or some rows of it.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        config: a quantized configuration whose group divides the columns; the mx modes are rounded
            to nearest.

    Returns:
        `weight` (uint32, packed), `scales`, and `biases` where the mode has them.
    """
    if config.mode != "affine":
        return rtn.quantize(weight, config)
    return find_codes(weight, config, stretched=True).packed()


def find_codes(
    weight: mx.array,
    config: QuantConfig,
    importance: np.ndarray | None = None,
    stretched: bool = False,
    alone: bool = True,
) -> Codes:
    """Codes on the grids with the least squared error of those that are tried.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        config: an affine configuration.
        importance: float32 (experts, columns), how much a column's squared error counts; all alike
            by default.
        stretched: whether rows are stretched to the size that they had (`unshrink`, all columns
            alike).
        alone: whether this is all that runs, so that several streams share the work; not in one of
            several threads.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    expert = np.arange(len(rows)) // weight.shape[-2]
    codes = np.empty(rows.shape, dtype=np.uint8)
    scales, biases = [], []

    # Some rows at a time, as many of these at once as there are streams.
    pieces = list(_chunks(*rows.shape))
    contexts: list[Any] = [nullcontext()]
    if alone:
        contexts = [mx.stream(stream) for stream in working()]
    for start in range(0, len(pieces), len(contexts)):
        batch = pieces[start : start + len(contexts)]
        results = []
        for context, piece in zip(contexts, batch, strict=False):
            with context:
                counts = None if importance is None else mx.array(importance[expert[piece]])
                grid = _search(rows[piece], config, counts)
                results.append(_stretch(rows[piece], grid) if stretched else grid)
        mx.eval(results)
        for piece, (some_codes, some_scales, some_biases) in zip(batch, results, strict=True):
            codes[piece] = np.array(some_codes)
            scales.append(some_scales)
            biases.append(some_biases)

    shape = (*weight.shape[:-1], -1)
    return Codes(
        config,
        codes.reshape(weight.shape),
        mx.concatenate(scales).reshape(shape),
        mx.concatenate(biases).reshape(shape),
    )


def unshrink(weight: mx.array, rounded: Codes, moments: np.ndarray) -> Codes:
    """Stretch each row's grids by a = (w H w) / (w' H w), w' being what its codes stand for.

    Args:
        weight: (experts, rows, columns), what was quantized.
        rounded: its codes.
        moments: H, float32 (experts, columns, columns).
    """
    grids = []
    for expert, moment in enumerate(moments):
        rows = weight[expert]
        grid = (
            mx.array(rounded.codes[expert]),
            rounded.scales[expert],
            rounded.biases[expert],
        )
        grids.append(_stretch(rows, grid, rows.astype(mx.float32) @ mx.array(moment)))
    _, scales, biases = (mx.stack(list(arrays)) for arrays in zip(*grids, strict=True))
    return Codes(rounded.config, rounded.codes, scales, biases)


def _stretch(rows: mx.array, grid: Grid, weighted: mx.array | None = None) -> Grid:
    """Grids whose rows have the size that the weights had.

    Args:
        rows: (rows, columns), what was quantized.
        grid: its codes, scales and biases.
        weighted: float32 (rows, columns), the weights times H; the weights themselves by default.
    """
    codes, scales, biases = grid
    exact = rows.astype(mx.float32)
    unit = _unit(exact)
    exact = exact / unit
    weighted = exact if weighted is None else weighted / unit

    by_group = (*scales.shape, -1)
    scale, bias = (array.astype(mx.float32) / unit for array in (scales, biases))
    restored = codes.reshape(by_group) * scale[..., None] + bias[..., None]
    energy = (exact * weighted).sum(axis=-1, keepdims=True)
    product = (restored.reshape(exact.shape) * weighted).sum(axis=-1, keepdims=True)
    stretch = mx.where((energy > 0) & (product > 0), energy / product, 1) * unit
    return codes, (scale * stretch).astype(scales.dtype), (bias * stretch).astype(biases.dtype)


def _search(rows: mx.array, config: QuantConfig, importance: mx.array | None) -> Grid:
    """Codes (rows, columns), scales and biases (rows, groups) of some rows (rows, columns)."""
    top = 2**config.bits - 1
    shape = (rows.shape[0], -1, config.group_size)
    exact = rows.astype(mx.float32)
    unit = _unit(exact)[..., None]
    exact = exact.reshape(shape) / unit
    counts = None if importance is None else _normalized(importance.reshape(shape))

    # Weights are told from the middle of their group, for the precision of the sums.
    low, high = exact.min(axis=-1, keepdims=True), exact.max(axis=-1, keepdims=True)
    middle, width = (high + low) / 2, high - low
    weights = exact - middle

    # mx.quantize's own grid is the first that is tried.
    packed = mx.quantize(rows, config.group_size, config.bits)
    scale, bias = (array.astype(mx.float32)[..., None] / unit for array in packed[1:])
    best = _try(weights, scale, bias - middle, top, counts)
    for shrink in SHRINKS[config.bits]:
        scale, bias = shrink * width / top, -shrink * width / 2
        for _ in range(REFITS):
            scale, bias = _refit(weights, _round(weights, scale, bias, top), counts)
        scale, total = (
            (array * unit).astype(rows.dtype).astype(mx.float32) / unit
            for array in (scale, bias + middle)
        )
        tried = _try(weights, scale, total - middle, top, counts)
        better = tried[-1] < best[-1]
        best = tuple(mx.where(better, new, old) for new, old in zip(tried, best, strict=True))
    codes, scale, bias, _ = best
    return (
        codes.astype(mx.uint8).reshape(rows.shape),
        (scale * unit)[..., 0].astype(rows.dtype),
        ((bias + middle) * unit)[..., 0].astype(rows.dtype),
    )


def _unit(rows: mx.array) -> mx.array:
    """The power of two (..., 1) below each row's largest weight, whose square may overflow."""
    peak = mx.abs(rows).max(axis=-1, keepdims=True)
    return mx.power(2.0, mx.floor(mx.log2(mx.maximum(peak, SMALLEST))))


def _normalized(importance: mx.array) -> mx.array:
    """What columns count, one on average in each group; nothing where none counts."""
    return importance / mx.maximum(importance.mean(axis=-1, keepdims=True), 1e-30)


def _try(
    weights: mx.array, scale: mx.array, bias: mx.array, top: int, counts: mx.array | None
) -> tuple[mx.array, ...]:
    """Codes, scale, bias and the squared error (..., 1) of each group on a grid."""
    codes = _round(weights, scale, bias, top)
    squared = mx.square(codes * scale + (bias - weights))
    squared = squared if counts is None else squared * counts
    return codes, scale, bias, squared.sum(axis=-1, keepdims=True)


def _round(weights: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    """The nearest codes, float32; 0 where a group has one value only."""
    inverse = mx.where(scale == 0, 0, 1 / scale)
    return mx.clip(mx.round(weights * inverse - bias * inverse), 0, top)


def _refit(
    weights: mx.array, codes: mx.array, counts: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Scale and bias (..., 1) of the least squared error for some codes."""
    size = weights.shape[-1]
    counted, total = codes, weights.sum(axis=-1, keepdims=True)
    if counts is not None:
        counted = codes * counts
        total = (weights * counts).sum(axis=-1, keepdims=True)
    code = counted.sum(axis=-1, keepdims=True) / size
    spread = (counted * codes).sum(axis=-1, keepdims=True) - size * code * code
    products = (counted * weights).sum(axis=-1, keepdims=True) - code * total
    scale = mx.where(spread > 0, products / spread, 0)
    return scale, total / size - scale * code


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that hold about CHUNK weights each."""
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)
