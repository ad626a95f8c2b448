"""What affine configurations lose, computed in numpy as MLX would quantize and restore.

On a CPU MLX takes 15 to 30 ns to restore one weight of 3, 5 or 6 bits, and a profile has eighteen
configurations. Here all of them share the columns that groups are turned into (columns.py) and the
ranges of the smallest groups, and none is packed. Every step rounds as MLX's does, so the errors
are the same: codes in float32, scales and biases in the weights' type, and the restored weight in
that type after its product and after its sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..base.quant_config import AFFINE_GROUPS, QuantConfig
from .columns import as_columns, rounder

SMALLEST = min(AFFINE_GROUPS)
SMALLEST_SCALE = 1e-7  # that mx.quantize makes in affine mode
SPLIT = np.float32(2**16 + 1)  # leaves the upper 8 of 24 digits of a float32, as bfloat16 has


@np.errstate(over="ignore", invalid="ignore")  # rows that aren't finite are measured elsewhere
def error_sums(
    rows: np.ndarray, dtype: mx.Dtype, configs: Sequence[QuantConfig], columns: np.ndarray | None
) -> np.ndarray:
    """Sums over rows: of the weights' squares, then of the squared errors of each configuration.

    Args:
        rows: (experts, rows, columns), as `columns.raw_rows` gives them.
        dtype: of the weights.
        configs: affine, whose groups divide the columns.
        columns: weights of the columns, float32 (experts, columns) or (1, columns), or None.

    Returns:
        float32 (1 + configs, experts, rows); with weights of the columns there follow the same sums
        of squares times these.
    """
    weights = as_columns(rows, SMALLEST)
    low, high = weights.min(axis=0), weights.max(axis=0)
    counts = None
    if columns is not None:
        counts = as_columns(columns, SMALLEST).reshape(SMALLEST, len(columns), 1, -1)
    by_row = (SMALLEST, *rows.shape[:2], -1)
    sums = np.empty((1 if columns is None else 2, 1 + len(configs), *rows.shape[:2]), np.float32)

    def add(index: int, squares: np.ndarray) -> None:
        squares = squares.reshape(by_row)
        sums[0, index] = squares.sum(axis=0).sum(axis=-1)
        if counts is not None:
            squares *= counts
            sums[1, index] = squares.sum(axis=0).sum(axis=-1)

    error, work = np.empty_like(weights), np.empty_like(weights)
    add(0, np.multiply(weights, weights, out=error))
    round_to = _rounding(dtype, work)
    for index, config in enumerate(configs, start=1):
        _set_error(error, weights, low, high, config, round_to)
        add(index, np.multiply(error, error, out=error))
    return sums.reshape(-1, *rows.shape[:2])


def _set_error(
    error: np.ndarray,
    weights: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    config: QuantConfig,
    round_to: Callable[[np.ndarray], None],
) -> None:
    """Fill an array with what a configuration makes of weights, less the weights.

    Args:
        error: float32 (SMALLEST, groups), overwritten.
        weights: the same, the smallest groups as columns.
        low, high: float32 (groups,), the least and the largest weight of each.
        config: the configuration.
        round_to: rounds an array in place, as the weights' type does.
    """
    top, wider = np.float32(2**config.bits - 1), config.group_size // SMALLEST
    scale, bias = nearest_grid(
        low.reshape(-1, wider).min(axis=1), high.reshape(-1, wider).max(axis=1), top
    )
    np.subtract(weights, np.repeat(bias, wider), out=error)
    error /= np.repeat(scale, wider)
    np.rint(error, out=error)
    np.clip(error, 0, top, out=error)

    # Scales and biases are stored in the weights' type, and so is what is restored of them.
    for numbers in (scale, bias):
        round_to(numbers)
    error *= np.repeat(scale, wider)
    round_to(error)
    error += np.repeat(bias, wider)
    round_to(error)
    error -= weights


def nearest_grid(
    low: np.ndarray, high: np.ndarray, top: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases (groups,) of `mx.quantize`: zero and the farther end lie on its grid.

    Args:
        low, high: float32 (groups,), the least and the largest weight.
        top: the largest code.
    """
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(SMALLEST_SCALE))
    scale = np.where(below, scale, -scale)
    edge = np.where(below, low, high)
    steps = np.rint(edge / scale)
    is_zero = steps == 0
    return np.where(is_zero, scale, edge / np.where(is_zero, 1, steps)), np.where(is_zero, 0, edge)


def _rounding(dtype: mx.Dtype, work: np.ndarray) -> Callable[[np.ndarray], None]:
    """What rounds float32 numbers to a type in place; `work` (float32) is overwritten."""
    if dtype != mx.bfloat16:
        rounded = rounder(dtype)
        return lambda numbers: np.copyto(numbers, rounded(numbers))

    # Dekker's splitting takes a third of the time of rounding the bits, with the same result.
    def split(numbers: np.ndarray) -> None:
        part = work.reshape(-1)[: numbers.size].reshape(numbers.shape)
        np.multiply(numbers, SPLIT, out=part)
        np.subtract(part, numbers, out=numbers)
        np.subtract(part, numbers, out=numbers)

    return split


def range_sums(rows: np.ndarray, group_sizes: Sequence[int]) -> np.ndarray:
    """Sums over rows: of the weights' squares, then of the squared ranges of groups of each size.

    Args:
        rows: as for `error_sums`.
        group_sizes: multiples of the smallest one that divide the columns.

    Returns:
        float32 (1 + group sizes, experts, rows).
    """
    weights = as_columns(rows, SMALLEST)
    low, high = weights.min(axis=0), weights.max(axis=0)
    weights *= weights
    sums = [weights.sum(axis=0).reshape(*rows.shape[:2], -1).sum(axis=-1)]
    for size in group_sizes:
        wider = size // SMALLEST
        width = high.reshape(-1, wider).max(axis=1) - low.reshape(-1, wider).min(axis=1)
        sums.append(np.square(width).reshape(*rows.shape[:2], -1).sum(axis=-1))
    return np.stack(sums)
