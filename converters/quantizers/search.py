"""Searches the range of each group's grid, and undoes what that shrinks: from the weights alone.

`mx.quantize` spreads a grid over all of a group's range. A narrower one clips its largest weights
and rounds all others finer. Its grid and one or two of other ranges are tried, each with scale and
bias refitted by least squares to the codes that it gives, and the best one is refitted once more
(Choukroun et al., 2019, choose ranges by squared error; llama.cpp's K-quants refit as well). Of 2
and 3 bits a weight's error counts the more the larger it is, as theirs does: what a narrow range
clips may belong to one of the few huge inputs that language models have, which weights don't show.

Least squares returns (1 - e) w plus noise, coherent over a layer's rows: at 2 bits gate and up come
out 3 to 4 % too small each, and their product 7 %. Squared errors call that good, the model doesn't
(docs/research-log.md). So each row's scales and biases are stretched in the end, until its product
with the weight is that of the weight with itself (as Banner et al., 2018, correct the norm).

All of this runs in numpy, which is faster than MLX on a CPU, so that every device finds the same
codes: for the same reason no sum is of fused products, which not every CPU has. Arrays of groups
have one column for each group (columns.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...base.quant_config import QuantConfig
from ...base.threads import in_threads
from ...measure.columns import (
    as_columns,
    as_rows,
    pack_columns,
    raw_rows,
    rounder,
    tiled,
)
from . import rtn

# Codes (rows, columns), scales and biases (rows, groups).
Grid = tuple[np.ndarray, np.ndarray, np.ndarray]

# The ranges that are tried, as shares of a group's own, by bits (docs/research-log.md).
RANGES = {2: (0.7,), 3: (0.92, 0.8), 4: (0.97, 0.9), 5: (0.98,), 6: (1.0,), 8: (1.0,)}
COARSE = 3  # bits up to which large weights count more
SMALLEST = 1e-37  # numbers below lose digits in float32
SAFE = 2.0**20  # the squares of weights up to this, and from its inverse on, are normal numbers
CHUNK = 1 << 20  # weights at once: for fewer, threads wait for the interpreter
WORKERS = 8  # threads at most


@dataclass(frozen=True)
class Groups:
    """Some weights as they are searched, with a column for each group; all arrays float32.

    Attributes:
        weights: (group_size, groups), divided by `unit`, less `middle`.
        unit: (groups,), powers of two; None where all are 1.
        middle: (groups,), of each group's range, divided by `unit`.
        counts: (group_size, groups), how much each weight's squared error counts, 1 on average in
            each group; None where all count alike.
        codes: (group_size, groups), whole numbers.
        counted: the codes times `counts`; the codes themselves where all count alike.
        work: (group_size, groups), overwritten by every step.
    """

    weights: np.ndarray
    unit: np.ndarray | None
    middle: np.ndarray
    counts: np.ndarray | None
    codes: np.ndarray
    counted: np.ndarray
    work: np.ndarray


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
    *lead, columns = weight.shape
    raw = raw_rows(weight)
    words = np.empty((len(raw), columns * config.bits // 32), dtype=np.uint32)
    scales = np.empty((len(raw), columns // config.group_size), dtype=np.float32)
    biases = np.empty_like(scales)

    def work(rows: slice) -> None:
        by_size = config.bits <= COARSE
        groups, scale, bias, total = _search(raw[rows], config, weight.dtype, by_size=by_size)
        total = groups.weights.sum(axis=0) if by_size else total
        words[rows] = pack_columns(groups.codes, config.bits).reshape(words[rows].shape)
        factor = _row_factor(groups, scale, bias, total, len(raw[rows]))
        np.multiply(scale.reshape(len(factor), -1), factor, out=scales[rows])
        np.multiply(bias.reshape(len(factor), -1), factor, out=biases[rows])

    in_threads(work, ((rows,) for rows in _pieces(*raw.shape)), WORKERS)
    packed = {"weight": mx.array(words.reshape(*lead, -1))}
    for name, numbers in (("scales", scales), ("biases", biases)):
        packed[name] = mx.array(numbers.reshape(*lead, -1)).astype(weight.dtype)
    return packed


def find_grid(
    exact: np.ndarray,
    config: QuantConfig,
    dtype: mx.Dtype,
    importance: np.ndarray | None = None,
) -> Grid:
    """The grids with the least squared error of those that are tried, and their codes.

    Args:
        exact: float32 (rows, columns), the weights.
        config: affine.
        dtype: that scales and biases are stored in.
        importance: float32 (columns,), how much a column's squared error counts; all alike by
            default.

    Returns:
        Codes, uint8; scales and biases, float32 numbers of the type that they are stored in.
    """
    codes = np.empty(exact.shape, dtype=np.uint8)
    scales = np.empty((len(exact), exact.shape[1] // config.group_size), dtype=np.float32)
    biases = np.empty_like(scales)
    for rows in _pieces(*exact.shape):
        groups, scale, bias, _ = _search(exact[rows], config, dtype, importance)
        codes[rows] = as_rows(groups.codes.astype(np.uint8), exact.shape[1])
        scales[rows] = scale.reshape(scales[rows].shape)
        biases[rows] = bias.reshape(biases[rows].shape)
    return codes, scales, biases


@np.errstate(over="ignore", invalid="ignore")  # weights that aren't finite may be allowed
def _search(
    rows: np.ndarray,
    config: QuantConfig,
    dtype: mx.Dtype,
    importance: np.ndarray | None = None,
    by_size: bool = False,
) -> tuple[Groups, np.ndarray, np.ndarray, np.ndarray]:
    """The best grids of some rows.

    Args:
        rows: as `raw_rows` gives them.
        config, dtype, importance: as for `find_grid`.
        by_size: whether a weight's error counts the more the larger it is, importance aside.

    Returns:
        The groups with their codes; scales and biases (groups,) as they are stored; the sums of
        the groups' weights, each times what it counts.
    """
    top = np.float32(2**config.bits - 1)
    groups, low, high = _as_groups(rows, config.group_size, importance, by_size)
    total = _total(groups)

    # Each range is refitted once, and the best one again.
    scale, bias = _nearest_grid(low, high, top)
    best = _refit(groups, scale, bias - groups.middle, top, total)
    for share in RANGES[config.bits]:
        width = np.float32(share) * (high - low)
        other = _refit(groups, width / top, -width / 2, top, total)
        better = other[2] > best[2]
        for numbers, others in zip(best, other, strict=True):
            np.copyto(numbers, others, where=better)
    scale, _, _, count = _refit(groups, *best[:2], top, total)

    # The bias that is stored belongs to the scale that is stored, and so do the codes.
    stored, unit = rounder(dtype), np.float32(1) if groups.unit is None else groups.unit
    stored_scale = stored(scale * unit)
    scale = stored_scale / unit
    bias = (total - scale * count) / np.float32(config.group_size)
    stored_bias = stored((bias + groups.middle) * unit)
    _round(groups, scale, stored_bias / unit - groups.middle, top)
    return groups, stored_scale, stored_bias, total


def _as_groups(
    rows: np.ndarray, size: int, importance: np.ndarray | None, by_size: bool
) -> tuple[Groups, np.ndarray, np.ndarray]:
    """Some rows as groups, with each one's lowest and highest weight, divided by its unit."""
    weights = as_columns(rows, size)
    low, high = weights.min(axis=0), weights.max(axis=0)
    unit = _unit(low, high, len(rows))
    if unit is not None:
        weights /= unit
        low, high = low / unit, high / unit

    # Weights are told from the middle of their group, for the precision of the sums.
    middle = (high + low) / 2
    weights -= middle
    counts = None
    if importance is not None:
        counts = _counts(importance, len(rows), size)
    elif by_size:
        counts = _counts_by_size(weights, middle)
    codes, work = np.empty_like(weights), np.empty_like(weights)
    counted = codes if counts is None else np.empty_like(codes)
    return Groups(weights, unit, middle, counts, codes, counted, work), low, high


def _nearest_grid(
    low: np.ndarray, high: np.ndarray, top: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases (groups,) of `mx.quantize`: zero and the farther end lie on its grid."""
    below = np.abs(low) > np.abs(high)
    scale = np.where(below, high - low, low - high) / top
    edge = np.where(below, low, high)
    steps = np.rint(edge / _or_one(scale))
    return np.where(steps == 0, scale, edge / _or_one(steps)), np.where(steps == 0, 0, edge)


def _round(groups: Groups, scale: np.ndarray, bias: np.ndarray, top: np.float32) -> None:
    """Find the nearest codes; a group of one value has a scale of 0, and codes of 0."""
    codes, inverse = groups.codes, 1 / _or_one(scale)
    np.multiply(groups.weights, inverse, out=codes)
    codes -= bias * inverse
    np.rint(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    if groups.counts is not None:
        np.multiply(codes, groups.counts, out=groups.counted)


def _refit(
    groups: Groups, scale: np.ndarray, bias: np.ndarray, top: np.float32, total: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scale and bias of the least squared error for the codes of a grid.

    Returns:
        Both; by how much the squared error is less than that of one value for all; the sums of the
        codes, each times what it counts.
    """
    _round(groups, scale, bias, top)
    count = groups.counted.sum(axis=0)
    code = count / np.float32(len(groups.codes))
    squares = _squares(groups)
    products = np.multiply(groups.counted, groups.weights, out=groups.work).sum(axis=0)

    products -= code * total
    spread = squares - np.float32(len(groups.codes)) * code * code
    scale = np.where(spread > 0, products / np.where(spread > 0, spread, 1), np.float32(0))
    bias = total / np.float32(len(groups.codes)) - scale * code
    return scale, bias, scale * products, count


def _squares(groups: Groups) -> np.ndarray:
    """The sums of the groups' squared codes, each times what it counts."""
    if groups.counts is None:
        # (Whole numbers below 2^24: these sums are exact, also of fused products.)
        return np.asarray(np.einsum("cg,cg->g", groups.codes, groups.codes))
    return np.asarray(np.multiply(groups.counted, groups.codes, out=groups.work).sum(axis=0))


def _total(groups: Groups) -> np.ndarray:
    """The sums of the groups' weights, each times what it counts."""
    if groups.counts is None:
        return np.asarray(groups.weights.sum(axis=0))
    return np.asarray(np.multiply(groups.weights, groups.counts, out=groups.work).sum(axis=0))


@np.errstate(over="ignore", invalid="ignore")
def _row_factor(
    groups: Groups, scale: np.ndarray, bias: np.ndarray, total: np.ndarray, rows: int
) -> np.ndarray:
    """By how much rows are too small on their grids (rows, 1): (w w) / (w' w), w' from the codes.

    Args:
        groups: with the codes.
        scale, bias: (groups,), as they are stored.
        total: (groups,), the sums of their weights.
        rows: that the groups are of.
    """
    size, middle = np.float32(len(groups.codes)), groups.middle
    if groups.unit is not None:
        scale, bias = scale / groups.unit, bias / groups.unit
    energy = np.multiply(groups.weights, groups.weights, out=groups.work).sum(axis=0)
    energy += middle * (2 * total + size * middle)
    product = np.multiply(groups.codes, groups.weights, out=groups.work).sum(axis=0)
    product += middle * groups.codes.sum(axis=0)
    product = scale * product + bias * (total + size * middle)
    sums = (array.reshape(rows, -1).sum(axis=1, keepdims=True) for array in (energy, product))
    return stretch(*sums)


def stretch(energy: np.ndarray, product: np.ndarray) -> np.ndarray:
    """What rows are multiplied with to be as large as the weights, float32: energy / product.

    1 where either isn't positive.

    Args:
        energy: float32, w H w of each row, H the second moments of its inputs or the unit matrix.
        product: of its shape, w' H w, with w' what the codes stand for.
    """
    possible = (energy > 0) & (product > 0)
    return np.where(possible, energy / np.where(possible, product, 1), np.float32(1))


def power_of_two(peak: np.ndarray) -> np.ndarray:
    """The power of two below each of some numbers, float32, to divide by."""
    return np.exp2(np.floor(np.log2(np.maximum(peak, SMALLEST)))).astype(np.float32)


def _or_one(numbers: np.ndarray) -> np.ndarray:
    """Numbers to divide by: 1 in place of 0."""
    return np.where(numbers == 0, np.float32(1), numbers)


def _counts(importance: np.ndarray, rows: int, size: int) -> np.ndarray:
    """What weights count, one on average in each group, for all groups of some rows."""
    groups = importance.reshape(-1, size)
    groups = groups / np.maximum(groups.mean(axis=1, keepdims=True), 1e-30)
    return tiled(groups.astype(np.float32), rows)


def _counts_by_size(weights: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """What weights count, one on average: half of it alike for all, half in proportion to size."""
    counts = np.abs(weights + middle)
    counts *= np.float32(0.5) / _or_one(counts.mean(axis=0))
    counts += np.float32(0.5)
    return counts


def _unit(low: np.ndarray, high: np.ndarray, rows: int) -> np.ndarray | None:
    """The power of two below each row's largest weight, (groups,); None where no row needs one.

    The squares of others would be infinite or zero.
    """
    peak = np.maximum(np.abs(low), np.abs(high)).reshape(rows, -1).max(axis=1, keepdims=True)
    peak = np.where(np.isfinite(peak) & (peak > 0), peak, 1)
    if peak.max() < SAFE and peak.min() > 1 / SAFE:
        return None
    return np.repeat(power_of_two(peak), len(low) // rows, axis=1).reshape(-1)


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that hold about CHUNK weights each."""
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)
