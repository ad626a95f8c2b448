"""The codes of groups of weights that lie on a grid.

A group lies on an affine grid where some number of equal steps between its least and its largest
weight comes as close to each weight as rounding to bfloat16 allows. Random weights never do: of 32
weights each fits by chance with a probability of .1 to .4. The mx modes have values of their own,
which weights match exactly or not at all.

All of this runs in numpy, so that every device finds the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ..base.quant_config import QuantConfig

CHUNK = 1 << 17  # weights at once: small enough for the CPU's cache
ROUNDING = 2.0**-8  # half the distance of neighbours in bfloat16, relative to the number
EXACT_STEPS = 64  # codes of 8 bits could not stand the rounding of a product in 16 bits
GLANCED = 8  # weights of a group that rule out most numbers of steps
GLANCES = 1 << 15  # weights that are held against numbers of steps at once
SLACK = 0.12  # of a step, that weights on more than 64 values may be off beside their rounding
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def affine_codes(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes on the coarsest grid of at most 2^bits values that a group lies on.

    Args:
        groups: float32 (groups, weights).
        bits: of the codes.

    Returns:
        uint8 (groups, weights), the least code 0; bool (groups,), whether a group is on a grid.
    """
    codes = np.zeros(groups.shape, dtype=np.uint8)
    fits = ~varies(groups) & np.isfinite(groups[:, 0])
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
        fitted_scale, fitted_low = least_squares(codes, groups)
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


def least_squares(codes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias (groups, 1) that bring codes closest to the weights of each group."""
    mean_code = codes.mean(axis=1, keepdims=True)
    mean = weights.mean(axis=1, keepdims=True)
    centred = codes - mean_code
    spread = np.square(centred).sum(axis=1, keepdims=True)
    products = (centred * (weights - mean)).sum(axis=1, keepdims=True)
    scale = products / np.where(spread > 0, spread, 1)
    return scale, mean - scale * mean_code


def mx_codes(groups: np.ndarray, grid: QuantConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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

    # Nearly all groups of other weights have more sizes than the format has.
    sizes = np.sort(np.abs(groups), axis=1)
    few = 1 + (np.diff(sizes, axis=1) > 0).sum(axis=1) <= len(FP4)
    if not few.any():
        return codes, scales, fits
    for scale, stored, possible in _mx_scales(sizes[:, -1], grid):
        some = np.flatnonzero(possible & few & ~fits)
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


def varies(groups: np.ndarray) -> np.ndarray:
    """Which groups (groups, weights) hold more than one value: bool (groups,)."""
    return np.asarray(groups.min(axis=1) < groups.max(axis=1))


def in_chunks(groups: np.ndarray) -> Iterator[np.ndarray]:
    """Groups (groups, weights), some at a time."""
    step = max(1, CHUNK // groups.shape[1])
    for start in range(0, len(groups), step):
        yield groups[start : start + step]


def as_numbers(weight: mx.array) -> np.ndarray:
    """A weight as float32 numbers."""
    return np.array(weight.astype(mx.float32))
