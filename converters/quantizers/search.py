"""Searches the range of each group's grid, and undoes what that shrinks: from the weights alone.

`mx.quantize` spreads a grid over all of a group's range. A narrower one clips its largest weights
and rounds all others finer. Several ranges are tried, each with scale and bias refitted by least
squares to the codes that it gives, and the one with the least squared error is taken (Choukroun et
al., 2019, choose ranges by squared error; llama.cpp's K-quants refit as well).

Least squares returns (1 - e) w plus noise, coherent over a layer's rows: at 2 bits gate and up come
out 3 to 4 % too small each, and their product 7 %. Squared errors call that good, the model doesn't
(docs/research-log.md). So each row's scales and biases are stretched in the end, until its product
with the weight is that of the weight with itself (as Banner et al., 2018, correct the norm).

All of this runs in numpy, which is faster than MLX on a CPU, so that every device finds the same
codes. Arrays of groups have one column for each group: sums over a group are then sums of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ...base.quant_config import QuantConfig
from ...base.threads import in_threads
from ...measure.grid_fit import rounder
from . import rtn
from .codes import Codes

# Codes (rows, columns), scales and biases (rows, groups).
Grid = tuple[np.ndarray, np.ndarray, np.ndarray]

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
CHUNK = 1 << 16  # weights at once: small enough for the CPU's cache
WORKERS = 8  # threads at most


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

    # mx.quantize's own grids are the first that are tried.
    nearest = rtn.quantize(weight, config)
    by_row = weight.reshape(-1, weight.shape[-1])
    start_scales, start_biases = (
        np.array(nearest[name].astype(mx.float32)).reshape(len(by_row), -1)
        for name in ("scales", "biases")
    )
    codes = np.empty(by_row.shape, dtype=np.uint8)
    scales, biases = np.empty_like(start_scales), np.empty_like(start_biases)

    def work(rows: slice, exact: np.ndarray) -> None:
        start = start_scales[rows], start_biases[rows]
        grid = stretch(exact, find_grid(exact, start, config, weight.dtype))
        codes[rows], scales[rows], biases[rows] = grid

    pieces = ((rows, np.array(by_row[rows].astype(mx.float32))) for rows in _pieces(*by_row.shape))
    in_threads(work, pieces, WORKERS)

    shape = nearest["scales"].shape
    stored = (mx.array(array).reshape(shape).astype(weight.dtype) for array in (scales, biases))
    return Codes(config, codes.reshape(weight.shape), *stored).packed()


def find_grids(
    exact: np.ndarray,
    start: tuple[np.ndarray, np.ndarray],
    config: QuantConfig,
    dtype: mx.Dtype,
    importance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases as `find_grid` chooses them, for any number of rows."""
    scales, biases = np.empty_like(start[0]), np.empty_like(start[1])
    for rows in _pieces(*exact.shape):
        some = start[0][rows], start[1][rows]
        grid = find_grid(exact[rows], some, config, dtype, importance)
        _, scales[rows], biases[rows] = grid
    return scales, biases


@np.errstate(over="ignore", invalid="ignore")  # weights that aren't finite may be allowed
def find_grid(
    exact: np.ndarray,
    start: tuple[np.ndarray, np.ndarray],
    config: QuantConfig,
    dtype: mx.Dtype,
    importance: np.ndarray | None = None,
) -> Grid:
    """The grids with the least squared error of those that are tried, and their codes.

    Args:
        exact: float32 (rows, columns), the weights.
        start: scales and biases, float32 (rows, groups), of grids that are tried first.
        config: affine.
        dtype: that scales and biases are stored in.
        importance: float32 (columns,), how much a column's squared error counts; all alike by
            default.

    Returns:
        Codes, uint8; scales and biases, float32 numbers of the type that they are stored in.
    """
    top = 2**config.bits - 1
    size = config.group_size
    unit = np.repeat(_unit(exact), exact.shape[1] // size, axis=0)[:, 0]
    weights = np.ascontiguousarray(exact.reshape(-1, size).T) / unit
    counts = None if importance is None else _counts(importance, len(exact), size)

    # Weights are told from the middle of their group, for the precision of the sums.
    low, high = weights.min(axis=0), weights.max(axis=0)
    middle, width = (high + low) / 2, high - low
    weights -= middle
    stored = rounder(dtype)
    work = np.empty_like(weights)

    scale, bias = start[0].reshape(-1) / unit, start[1].reshape(-1) / unit - middle
    codes = np.empty_like(weights)
    _round(weights, scale, bias, top, codes)
    least = _error(weights, codes, scale, bias, counts, work)
    for shrink in SHRINKS[config.bits]:
        some_scale, some_bias = shrink * width / top, -shrink * width / 2
        for _ in range(REFITS):
            _round(weights, some_scale, some_bias, top, codes)
            some_scale, some_bias = _refit(weights, codes, counts, work)
        some_scale = stored(some_scale * unit) / unit
        some_bias = stored((some_bias + middle) * unit) / unit - middle

        _round(weights, some_scale, some_bias, top, codes)
        error = _error(weights, codes, some_scale, some_bias, counts, work)
        better = error < least
        for best, other in ((scale, some_scale), (bias, some_bias), (least, error)):
            np.copyto(best, other, where=better)

    # The codes of the best grids are found once more, which takes less than keeping them.
    shape = (len(exact), -1)
    scales, biases = stored(scale * unit), stored((bias + middle) * unit)
    _round(weights, scale, bias, top, codes)
    codes_by_row = codes.astype(np.uint8).T.reshape(exact.shape)
    return codes_by_row, scales.reshape(shape), biases.reshape(shape)


@np.errstate(over="ignore", invalid="ignore")
def stretch(exact: np.ndarray, grid: Grid, weighted: np.ndarray | None = None) -> Grid:
    """Grids whose rows are as large as the weights: times (w H w) / (w' H w), w' from the codes.

    Args:
        exact: float32 (rows, columns), what was quantized.
        grid: its codes, scales and biases.
        weighted: float32 (rows, columns), the weights times H, the second moments of the inputs;
            the weights themselves by default.
    """
    codes, scales, biases = grid
    unit = _unit(exact)
    exact = exact / unit
    weighted = exact if weighted is None else weighted / unit

    restored = codes.reshape(*scales.shape, -1) * (scales / unit)[..., None]
    restored += (biases / unit)[..., None]
    energy = np.einsum("rc,rc->r", exact, weighted)[:, None]
    product = np.einsum("rc,rc->r", restored.reshape(exact.shape), weighted)[:, None]
    possible = (energy > 0) & (product > 0)
    factor = np.where(possible, energy / np.where(possible, product, 1), 1)
    return codes, scales * factor, biases * factor


def _round(
    weights: np.ndarray, scale: np.ndarray, bias: np.ndarray, top: int, out: np.ndarray
) -> np.ndarray:
    """The nearest codes, in float32; a group of one value has a scale of 0, and codes of 0."""
    inverse = 1 / np.where(scale == 0, np.float32(1), scale)
    np.multiply(weights, inverse, out=out)
    out -= bias * inverse
    np.rint(out, out=out)
    return np.clip(out, 0, top, out=out)


def _refit(
    weights: np.ndarray, codes: np.ndarray, counts: np.ndarray | None, work: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of the least squared error for some codes; `work` is overwritten."""
    size = len(weights)
    if counts is None:
        total, code = weights.sum(axis=0), codes.sum(axis=0) / size
        spread = np.multiply(codes, codes, out=work).sum(axis=0)
        products = np.multiply(codes, weights, out=work).sum(axis=0)
    else:
        counted = codes * counts
        total = np.multiply(weights, counts, out=work).sum(axis=0)
        code = counted.sum(axis=0) / size
        spread = np.multiply(counted, codes, out=work).sum(axis=0)
        products = np.multiply(counted, weights, out=work).sum(axis=0)
    spread -= size * code * code
    products -= code * total
    possible = spread > 0
    scale = np.where(possible, products / np.where(possible, spread, 1), np.float32(0))
    return scale, total / size - scale * code


def _error(
    weights: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    counts: np.ndarray | None,
    work: np.ndarray,
) -> np.ndarray:
    """The squared error of each group on a grid; `work` is overwritten."""
    np.multiply(codes, scale, out=work)
    work += bias
    work -= weights
    np.multiply(work, work, out=work)
    if counts is not None:
        work *= counts
    return np.asarray(work.sum(axis=0))


def _counts(importance: np.ndarray, rows: int, size: int) -> np.ndarray:
    """What columns count, one on average in each group, for all groups of some rows."""
    groups = importance.reshape(-1, size)
    groups = groups / np.maximum(groups.mean(axis=1, keepdims=True), 1e-30)
    return np.ascontiguousarray(np.tile(groups, (rows, 1)).T, dtype=np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    """The power of two (rows, 1) below each row's largest weight, whose square may overflow."""
    peak = np.abs(rows).max(axis=1, keepdims=True)
    return np.exp2(np.floor(np.log2(np.maximum(peak, SMALLEST)))).astype(np.float32)


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that hold about CHUNK weights each."""
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)
