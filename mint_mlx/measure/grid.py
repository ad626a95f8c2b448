"""Finds weights that lie on a grid already: those of models that were quantized before.

Quantization-aware training and the 16-bit copies of quantized models leave weights that take at
most 2^b equidistant values in each group. `mx.quantize` misses that grid, as it follows from the
range of a group alone; the grid's own codes lose next to nothing.

A group lies on an affine grid where some number of equal steps between its least and its largest
weight comes as close to each weight as rounding to bfloat16 allows. Random weights never do: of 32
weights each fits by chance with a probability of .1 to .4. The mx modes have values of their own,
which weights match exactly or not at all.

All of this runs in numpy, so that every device finds the same codes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from ..base.quant_config import AFFINE_BITS, AFFINE_GROUPS, QuantConfig, mx_mode
from ..checkpoint.row_reader import select_rows
from .distortion import as_experts

# As row_sampling.Read: experts (n,) and rows (n, k) -> their weights (n, k, columns).
Read = Callable[[np.ndarray, np.ndarray], mx.array]

FEW_GROUPS = 4  # of one row, that rule a grid out
GLANCE = 2048  # weights of one row that suggest one
SUGGESTS = 0.9  # the share of these groups that must fit
FITS = 0.99  # the share of a layer's groups that must fit
VARIES = 1 / 16  # the share of groups that must hold more than one value, to tell anything
SAMPLE = 1 << 18  # weights of a layer that are held against a grid
FEWEST = 4  # rows of each expert that are, at least
WORKERS = 8  # threads at most
PIECE = 1 << 21  # weights of a layer whose errors are measured at once
CHUNK = 1 << 17  # weights at once: small enough for the CPU's cache
ROUNDING = 2.0**-8  # half the distance of neighbours in bfloat16, relative to the number
EXACT_STEPS = 64  # codes of 8 bits could not stand the rounding of a product in 16 bits
GLANCED = 8  # weights of a group that rule out most numbers of steps
GLANCES = 1 << 15  # weights that are held against numbers of steps at once
SLACK = 0.12  # of a step, that weights on more than 64 values may be off beside their rounding
SHIFTS = 16  # codes may begin this far above zero, for the sake of a bias that 16 bits can hold
OPTIONS = 4  # ways to write a group's grid that are computed, of those that should lose least
MOST_OPTIONS = 24  # the same where most groups are restored exactly
MX_GRIDS = ("mxfp4", "nvfp4")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


@dataclass(frozen=True)
class Fitted:
    """Groups on a grid, as a configuration stores them.

    Attributes:
        codes: uint8 (groups, weights).
        scales: of affine modes float32 (groups,), numbers of the type that they are stored in; of
            mx modes uint8.
        biases: float32 (groups,), as the scales; None in the mx modes.
        error: float64 (groups,), squared; infinite where a group isn't on the grid.
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    error: np.ndarray


def describe(grid: QuantConfig) -> str:
    """A grid in words, such as `on a 4-bit grid of 32`."""
    if grid.mode != "affine":
        return f"on the grid of {grid}"
    return f"on {'an' if grid.bits == 8 else 'a'} {grid.bits}-bit grid of {grid.group_size}"


def grid_for(grids: Sequence[QuantConfig], config: QuantConfig) -> QuantConfig | None:
    """The grid whose weights a configuration can store, or None.

    An affine one takes any affine grid of no more bits in the same or larger groups.
    """

    def stores(grid: QuantConfig) -> bool:
        if grid.mode != "affine" or config.mode != "affine":
            return grid == config
        return grid.bits <= config.bits and grid.group_size % config.group_size == 0

    return next((grid for grid in grids if stores(grid)), None)


def find_grids(read: Read, shape: tuple[int, int, int]) -> tuple[QuantConfig, ...]:
    """The grids that a layer's weights lie on; of those with fewest bits first.

    Args:
        read: reads rows of the layer, in the type that they will be written in.
        shape: experts, rows and columns.
    """
    experts, _, columns = shape
    if columns % min(AFFINE_GROUPS):
        return ()

    # A few groups of one row rule out nearly every layer that is on no grid.
    row = _telling_row(read, shape)
    groups = row.reshape(-1, min(AFFINE_GROUPS))
    few = groups[_varies(groups)][:FEW_GROUPS]
    widest = (QuantConfig(max(AFFINE_BITS), groups.shape[1]), *map(mx_mode, MX_GRIDS))
    if not any(_share_on(few, grid) >= SUGGESTS for grid in widest):
        return ()

    # The rest of the row suggests which ones it may be on, and a sample of rows decides.
    suggested = _matching(row[:, : GLANCE if columns > GLANCE else None], SUGGESTS)
    if not suggested:
        return ()

    sample = sample_rows(shape)
    weights = _as_numbers(read(np.arange(experts), np.tile(sample, (experts, 1))))
    return _matching(weights, FITS, suggested)


def _telling_row(read: Read, shape: tuple[int, int, int]) -> np.ndarray:
    """A row of more than one value, float32 (1, columns), where one of three rows is."""
    experts, rows, columns = shape
    for expert, row in ((experts // 2, rows // 2), (0, 0), (experts - 1, rows - 1)):
        weights = _as_numbers(read(np.array([expert]), np.array([[row]]))).reshape(1, columns)
        if _varies(weights).any():
            break
    return weights


def _varies(groups: np.ndarray) -> np.ndarray:
    """Which groups (groups, weights) hold more than one value: bool (groups,)."""
    return np.asarray(groups.min(axis=1) < groups.max(axis=1))


def sample_rows(shape: tuple[int, int, int]) -> np.ndarray:
    """The rows of each expert that are held against a grid, evenly spaced: int (rows,)."""
    experts, rows, columns = shape
    count = min(rows, max(FEWEST, SAMPLE // (experts * columns)))
    return np.unique(np.linspace(0, rows - 1, count).astype(int))


def _matching(
    weights: np.ndarray, share: float, among: Sequence[QuantConfig] = ()
) -> tuple[QuantConfig, ...]:
    """The grids that at least a share of the groups fit, without those that another one implies.

    Args:
        weights: float32 (..., columns).
        share: of the groups that hold more than one value.
        among: grids that a look at fewer weights suggested: none of fewer bits, or of another mode,
            is tried. All by default.
    """
    grids: list[QuantConfig] = []
    for name in MX_GRIDS:
        grid = mx_mode(name)
        if (not among or grid in among) and _share_on(weights, grid) >= share:
            grids.append(grid)

    # What fits in a group fits in the smaller ones within it.
    bits_at_least = {grid.group_size: grid.bits for grid in among if grid.mode == "affine"}
    fewest = max(AFFINE_BITS) + 1
    for group in sorted(AFFINE_GROUPS, reverse=True):
        wider = [bits for size, bits in bits_at_least.items() if size >= group]
        if among and not any(size >= group for size in bits_at_least):
            continue
        least = bits_at_least.get(group, min(wider, default=0))
        for bits in AFFINE_BITS:
            grid = QuantConfig(bits, group)
            if least <= bits < fewest and _share_on(weights, grid) >= share:
                grids.append(grid)
                fewest = bits
                break

    # So many values come close to those of several smaller groups together.
    if any(grid.bits < 8 for grid in grids):
        grids = [grid for grid in grids if grid.bits < 8]
    return tuple(sorted(grids, key=lambda grid: (grid.bits, -grid.group_size)))


def _share_on(weights: np.ndarray, grid: QuantConfig) -> float:
    """The share of groups on a grid, of those that hold more than one value."""
    if weights.shape[-1] % grid.group_size:
        return 0.0
    varied = fitting = total = 0
    for groups in _in_chunks(weights.reshape(-1, grid.group_size)):
        varies = _varies(groups)
        if grid.mode == "affine":
            fits = _affine_codes(groups[varies], grid.bits)[1]
        else:
            fits = _mx_codes(groups[varies], grid)[2]
        total += len(groups)
        varied += len(fits)
        fitting += int(fits.sum())
        # A layer on no grid is left after its first chunk.
        if varied and fitting < 0.5 * varied:
            return 0.0
    return fitting / varied if varied > VARIES * total else 0.0


def _in_chunks(groups: np.ndarray) -> Iterator[np.ndarray]:
    """Groups (groups, weights), some at a time."""
    step = max(1, CHUNK // groups.shape[1])
    for start in range(0, len(groups), step):
        yield groups[start : start + step]


def grid_errors(
    weight: mx.array, grids: Sequence[QuantConfig], configs: Sequence[QuantConfig]
) -> tuple[np.ndarray, np.ndarray]:
    """What configurations lose that store a grid's codes, by expert.

    Args:
        weight: (experts, rows, columns) in the type that it will be written in.
        grids: of the layer.
        configs: each of which stores one of them.

    Returns:
        Squared errors, float64 (configs, experts); sums of squares, float64 (experts,).
    """
    errors = np.zeros((len(configs), weight.shape[0]))
    energy = np.zeros(weight.shape[0])
    rows = max(1, PIECE // weight.shape[-1])
    for expert in range(weight.shape[0]):
        for start in range(0, weight.shape[1], rows):
            piece = weight[expert, start : start + rows]
            energy[expert] += np.square(_as_numbers(piece), dtype=np.float64).sum()

            # A grid's codes are the same in configurations of more bits and smaller groups.
            fitted: dict[QuantConfig, Fitted] = {}
            for index, config in enumerate(configs):
                grid = grid_for(grids, config)
                assert grid is not None
                if grid not in fitted:
                    fitted[grid] = fit(piece, grid)
                nearest = nearest_errors(piece, config, grid.group_size)
                errors[index, expert] += np.minimum(fitted[grid].error, nearest).sum()
    return errors, energy


def nearest_errors(weight: mx.array, config: QuantConfig, group: int) -> np.ndarray:
    """The squared error of `mx.quantize` in each so many weights: float64 (groups,)."""
    size = config.group_size
    packed = mx.quantize(weight, size, config.bits, mode=config.mode)
    nearest = mx.dequantize(*packed, group_size=size, bits=config.bits, mode=config.mode)
    difference = _as_numbers(nearest).reshape(-1, group) - _as_numbers(weight).reshape(-1, group)
    return np.asarray(np.square(difference, dtype=np.float64).sum(axis=1))


def fit(weight: mx.array, grid: QuantConfig) -> Fitted:
    """A weight's groups on a grid.

    Args:
        weight: (..., columns) in the type that its scales shall have.
        grid: that it lies on.
    """

    def fit_some(groups: np.ndarray) -> Fitted:
        if grid.mode == "affine":
            return _fit_affine(groups, grid.bits, dtype)
        codes, scales, fits = _mx_codes(groups, grid)
        return Fitted(codes, scales, None, np.where(fits, 0.0, np.inf))

    dtype = weight.dtype
    groups = _as_numbers(weight).reshape(-1, grid.group_size)
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        pieces = list(pool.map(fit_some, _in_chunks(groups)))
    biases = [piece.biases for piece in pieces if piece.biases is not None]
    return Fitted(
        np.concatenate([piece.codes for piece in pieces]),
        np.concatenate([piece.scales for piece in pieces]),
        np.concatenate(biases) if biases else None,
        np.concatenate([piece.error for piece in pieces]),
    )


def _affine_codes(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes on the coarsest grid of at most 2^bits values that a group lies on.

    Args:
        groups: float32 (groups, weights).
        bits: of the codes.

    Returns:
        uint8 (groups, weights), the least code 0; bool (groups,), whether a group is on a grid.
    """
    codes = np.zeros(groups.shape, dtype=np.uint8)
    fits = ~_varies(groups) & np.isfinite(groups[:, 0])
    unresolved = np.flatnonzero(~fits & np.isfinite(groups).all(axis=1))
    rest = groups[unresolved]
    counts = np.arange(2**bits - 1, 0, -1)
    while len(rest) and len(counts):
        # Of few groups all numbers of steps are looked at together.
        several = max(1, GLANCES // (len(rest) * GLANCED))
        row, steps = np.nonzero(_may_have(rest, counts[:several]))
        fitting, some_codes = _try_steps(rest[row], counts[steps])
        row, first = np.unique(row[fitting], return_index=True)
        codes[unresolved[row]] = some_codes[first]
        fits[unresolved[row]] = True
        counts = counts[several:]
        unresolved = unresolved[~fits[unresolved]]
        rest = groups[unresolved]

    # Codes that are all multiples of a number are those of a coarser grid.
    common = np.gcd.reduce(codes, axis=1)
    return codes // np.maximum(common, 1)[:, None], fits


def _may_have(groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which groups may have so many equal steps, as their first weights tell.

    Args:
        groups: float32 (groups, weights), finite, none of them constant.
        counts: of steps, each at least 1.

    Returns:
        bool (groups, counts).
    """
    low = groups.min(axis=1)[:, None, None]
    peak = np.abs(groups).max(axis=1)[:, None, None]
    scale = (groups.max(axis=1)[:, None, None] - low) / counts[:, None].astype(np.float32)
    weights = groups[:, None, :GLANCED]

    # The ends of the group are rounded as well.
    slack = ROUNDING * (np.abs(weights) + (2 + 2 * _product(counts)[:, None]) * peak)
    codes = np.rint((weights - low) / scale)
    return np.asarray((np.abs(codes * scale + low - weights) <= slack).all(axis=-1))


def _try_steps(groups: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which groups have so many equal steps from the least to the largest weight.

    Args:
        groups: float32 (groups, weights), finite, none of them constant.
        steps: of each, at least 1.

    Returns:
        bool (groups,), and the codes of those groups, uint8 (fitting, weights).
    """
    steps = steps[:, None].astype(np.float32)
    low = groups.min(axis=1, keepdims=True)
    scale = (groups.max(axis=1, keepdims=True) - low) / steps
    peak = np.abs(groups).max(axis=1, keepdims=True)
    tolerance = ROUNDING * (np.abs(groups) + _product(steps) * peak)
    codes = np.rint((groups - low) / scale)

    # Both ends were rounded: all weights together say more of the scale.
    for again in (steps > 0, steps > 31):
        fitted_scale, fitted_low = _least_squares(codes, groups)
        scale = np.where(again, fitted_scale, scale)
        low = np.where(again, fitted_low, low)
        codes = np.rint((groups - low) / np.where(scale > 0, scale, 1))
    distance = np.abs(codes * scale + low - groups)
    inside = (codes >= 0) & (codes <= steps)

    # So many steps are no wider than the rounding of the largest weights: scale and bias are not
    # exact then.
    slack = np.where(steps >= EXACT_STEPS, SLACK * scale, 0)
    fits = ((distance <= 1.01 * tolerance + slack) & inside).all(axis=1) & (scale[:, 0] > 0)
    return fits, codes[fits].astype(np.uint8)


def _product(steps: np.ndarray) -> np.ndarray:
    """How often the rounding of a product in 16 bits may be added to a weight's own."""
    return np.where(steps < EXACT_STEPS, np.float32(2), np.float32(0))


def _least_squares(codes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias (groups, 1) that bring codes closest to the weights of each group."""
    mean_code = codes.mean(axis=1, keepdims=True)
    mean = weights.mean(axis=1, keepdims=True)
    centred = codes - mean_code
    spread = np.square(centred).sum(axis=1, keepdims=True)
    products = (centred * (weights - mean)).sum(axis=1, keepdims=True)
    scale = products / np.where(spread > 0, spread, 1)
    return scale, mean - scale * mean_code


def _fit_affine(groups: np.ndarray, bits: int, dtype: mx.Dtype) -> Fitted:
    """Codes, scales and biases whose product in 16 bits comes closest to the weights.

    Scales and biases are rounded to 16 bits, so of all ways to write a grid (which code is the
    least, whether the scale is negative) the one is taken that loses least.

    Args:
        groups: float32 (groups, weights).
        bits: of the grid.
        dtype: of scales and biases.
    """
    codes, fits = _affine_codes(groups, bits)
    rounded = _rounder(dtype)
    rising = codes.astype(np.float32)
    spread = np.square(rising - rising.mean(axis=1, keepdims=True)).sum(axis=1)
    scale, _ = _least_squares(rising, groups)
    top = rising.max(axis=1, keepdims=True)
    shift = np.arange(min(SHIFTS, 2**bits))

    # Each scale and each first code asks for another bias, and some are closer to 16-bit numbers.
    options = []
    for nearby in _neighbours(rounded(scale[:, 0]), dtype):
        for sign in (1, -1):
            signed = (sign * nearby)[:, None]
            bias = _bias(groups, _turned(rising, top, signed), signed) - signed * shift
            lost = np.square(rounded(bias) - bias) * groups.shape[1]
            lost += (np.square(nearby - scale[:, 0]) * spread)[:, None]
            lost[shift + top > 2**bits - 1] = np.inf
            options.append((np.broadcast_to(signed, bias.shape), bias, lost))
    scales, biases, lost = (np.concatenate(arrays, axis=1) for arrays in zip(*options, strict=True))

    # What the rounding of the product adds is known once it is computed, for the few best options.
    best_biases = rounded(groups[:, 0])
    zeros = np.zeros(len(groups), dtype=np.float32)
    best = Fitted(codes, zeros, best_biases, np.full(len(groups), np.inf))
    for number, option in enumerate(np.argsort(lost, axis=1, kind="stable")[:, :MOST_OPTIONS].T):
        some = np.flatnonzero(fits & (best.error > 0))
        # Where most groups are restored exactly, the others can be as well.
        if number >= OPTIONS and len(some) > len(groups) / 4:
            break
        option = option[some]
        signed = scales[some, option][:, None]
        bias = rounded(biases[some, option][:, None])
        shifted = _turned(rising[some], top[some], signed)
        shifted += shift[option % len(shift)][:, None]
        error = _error(groups[some], shifted * signed, bias, rounded)

        better = np.isfinite(lost[some, option]) & (error < best.error[some])
        index = some[better]
        best.codes[index] = shifted[better].astype(np.uint8)
        best.scales[index] = signed[better, 0]
        best_biases[index] = bias[better, 0]
        best.error[index] = error[better]
    return best


def _error(
    groups: np.ndarray,
    product: np.ndarray,
    bias: np.ndarray,
    rounded: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The squared error of each group under code x scale + bias.

    Weights that were restored on a GPU were rounded once, on a CPU twice.
    """
    once = np.square(rounded(product + bias) - groups).sum(axis=1)
    twice = np.square(rounded(rounded(product) + bias) - groups).sum(axis=1)
    return np.minimum(once, twice)


def _turned(codes: np.ndarray, top: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes that fall with rising weights where the scale is negative; the least stays 0."""
    return np.where(scale < 0, top - codes, codes).astype(np.float32)


def _bias(groups: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The bias (groups, 1) that brings codes on this scale closest to the weights."""
    mean = groups.mean(axis=1, keepdims=True)
    return np.asarray(mean - scale * codes.mean(axis=1, keepdims=True))


def _mx_codes(groups: np.ndarray, grid: QuantConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and scales of mxfp4 or nvfp4 whose values the weights are.

    Args:
        groups: float32 (groups, weights); of nvfp4 16 weights each.
        grid: one of MX_GRIDS.

    Returns:
        uint8 (groups, weights) and (groups,); bool (groups,), whether a group has such values.
    """
    codes = np.zeros(groups.shape, dtype=np.uint8)
    scales = np.zeros(len(groups), dtype=np.uint8)
    fits = np.zeros(len(groups), dtype=bool)
    peak = np.abs(groups).max(axis=1, initial=0)
    for scale, stored, possible in _mx_scales(peak, grid):
        some = np.flatnonzero(possible & ~fits)
        ratio = np.abs(groups[some]) / scale[some, None]
        index = np.minimum(np.searchsorted(FP4, ratio), len(FP4) - 1)
        good = (FP4[index] == ratio).all(axis=1)
        signed = index + 8 * (groups[some] < 0)
        codes[some[good]] = signed[good]
        scales[some[good]] = stored[some[good]]
        fits[some[good]] = True
    return codes, scales, fits


def _mx_scales(
    peak: np.ndarray, grid: QuantConfig
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The scales that a group may have, by its largest weight.

    Yields:
        float32 (groups,); uint8 (groups,), as they are stored; bool (groups,), where there is one.
    """
    if grid.mode == "mxfp4":
        # With the largest weight at 4 or 6, all finer values are there as well.
        exponent = np.frexp(peak)[1] - 3
        possible = (peak > 0) & np.isfinite(peak) & (np.abs(exponent) < 126)
        exponent = np.where(possible, exponent, 0)
        yield np.ldexp(np.float32(1), exponent), (exponent + 127).astype(np.uint8), possible
        return
    for value in FP4[:0:-1]:
        wanted = np.where(np.isfinite(peak), peak, 0) / value
        stored = mx.to_fp8(mx.array(wanted.astype(np.float32)))
        scale = np.array(mx.from_fp8(stored, dtype=mx.float32))
        yield np.where(scale > 0, scale, 1), np.array(stored), (scale == wanted) & (scale > 0)


def _as_numbers(weight: mx.array) -> np.ndarray:
    """A weight as float32 numbers."""
    return np.array(weight.astype(mx.float32))


def _rounder(dtype: mx.Dtype) -> Callable[[np.ndarray], np.ndarray]:
    """The function that rounds float32 numbers to a type; they stay float32."""
    if dtype == mx.bfloat16:
        return _to_bfloat16
    if dtype == mx.float16:
        return lambda numbers: numbers.astype(np.float16).astype(np.float32)
    return lambda numbers: numbers.astype(np.float32)


def _to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Finite float32 numbers rounded to bfloat16, to even where two are equally near."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _neighbours(scale: np.ndarray, dtype: mx.Dtype) -> Iterator[np.ndarray]:
    """Scales of a type and the next numbers of that type above and below; zero stays zero."""
    yield scale
    if dtype == mx.float32:
        return
    for step in (1, -1):
        if dtype == mx.bfloat16:
            moved = (scale.view(np.uint32) + np.uint32(step * 0x10000 % 2**32)).view(np.float32)
        else:
            half = scale.astype(np.float16).view(np.uint16) + np.uint16(step % 2**16)
            moved = half.view(np.float16).astype(np.float32)
        yield np.where(scale > 0, moved, scale)


def find_grids_of(weight: mx.array) -> tuple[QuantConfig, ...]:
    """As `find_grids`, for a weight (..., rows, columns) in memory."""
    stacked = as_experts(weight)
    experts, rows, columns = stacked.shape
    return find_grids(partial(select_rows, stacked), (experts, rows, columns))
