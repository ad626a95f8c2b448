"""The error that a configuration makes in weights: that of `mx.quantize` and `mx.dequantize`.

    NMSE = ||W - Q(W)||^2 / ||W||^2

A group never spans two rows, so errors are summed row by row, and a sample of rows estimates the
error of all (row_sampling.py). Where columns have weights, both sums are also taken with each
square times the weight of its column (column_weights.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..base.quant_config import AFFINE_GROUPS, QuantConfig
from ..base.streams import working
from ..base.threads import in_threads
from ..runtime.device import on_cpu
from .affine_errors import error_sums, range_sums
from .columns import raw_rows

# Weights measured at once: by MLX, few enough for the CPU's cache and many enough for the GPU; by
# numpy, few enough that several arrays of them stay in the cache.
CHUNK = 1 << 19
CHUNK_OF_NUMPY = 1 << 19
WORKERS = 8  # threads at most
Chunk = tuple[slice, slice]  # over experts and rows


class RowErrors(NamedTuple):
    """Squared errors of rows.

    Attributes:
        errors: float64 (configs, experts, rows).
        energy: float64 (experts, rows), the sums of squares of the weights.
        weighted_errors, weighted_energy: the same with squares times the weights of their columns;
            None where columns have none.
    """

    errors: np.ndarray
    energy: np.ndarray
    weighted_errors: np.ndarray | None = None
    weighted_energy: np.ndarray | None = None


def measure(weight: mx.array, configs: Sequence[QuantConfig]) -> tuple[np.ndarray, np.ndarray]:
    """NMSE of each configuration for each expert of one layer, and each expert's sum of squares.

    Args:
        weight: (..., rows, columns) in the type it will be quantized in; leading axes are experts
            or heads.
        configs: quantized configurations whose groups divide the last axis.

    Returns:
        float64 (configs, experts) and (experts,).
    """
    errors, energy = (sums.sum(axis=-1) for sums in row_errors(as_experts(weight), configs)[:2])
    # An expert of zeros is restored exactly: its error is zero, not undefined.
    return errors / np.where(energy > 0, energy, 1), energy


def as_experts(weight: mx.array) -> mx.array:
    """A weight (..., rows, columns) as (experts, rows, columns)."""
    return weight.reshape(-1, *weight.shape[-2:])


def row_errors(
    weight: mx.array, configs: Sequence[QuantConfig], columns: np.ndarray | None = None
) -> RowErrors:
    """Squared error of each row under each configuration, and each row's sum of squares.

    Args:
        weight: (experts, rows, columns).
        configs: as for `measure`.
        columns: weights of the columns, (experts, columns), or (1, columns) for all experts.
    """
    affine = [config for config in configs if config.mode == "affine"] if on_cpu() else []
    others = [config for config in configs if config not in affine]
    if not affine:
        return _errors_by_mlx(weight, others, columns)
    fast = _errors_by_numpy(weight, affine, columns)
    if not others:
        return fast

    # Both parts in the order that was asked for.
    slow = _errors_by_mlx(weight, others, columns)
    order = [(affine + others).index(config) for config in configs]
    weighted = None
    if fast.weighted_errors is not None and slow.weighted_errors is not None:
        weighted = np.concatenate([fast.weighted_errors, slow.weighted_errors])[order]
    errors = np.concatenate([fast.errors, slow.errors])[order]
    return RowErrors(errors, fast.energy, weighted, fast.weighted_energy)


def _errors_by_numpy(
    weight: mx.array, configs: Sequence[QuantConfig], columns: np.ndarray | None
) -> RowErrors:
    """`row_errors` of affine configurations, in as many threads as there are cores."""

    def sums_of(rows: np.ndarray, experts: slice) -> np.ndarray:
        return error_sums(rows, weight.dtype, configs, columns_of(columns, experts))

    count = (1 + len(configs)) * (1 if columns is None else 2)
    sums = _by_error(_numpy_sums(weight, sums_of, count), 1 + len(configs))

    # Weights above 1e18, and those that aren't finite, are left to MLX.
    for expert in np.flatnonzero(~np.isfinite(sums.energy).all(axis=1)).tolist():
        one = slice(expert, expert + 1)
        by_mlx = _errors_by_mlx(weight[one], configs, columns_of(columns, one))
        for array, exact in zip(sums, by_mlx, strict=True):
            if array is not None:
                array[..., one, :] = exact
    return sums


def columns_of(columns: np.ndarray | None, experts: slice | np.ndarray) -> np.ndarray | None:
    """The weights of the columns of some experts, of (experts, columns) or (1, columns) for all."""
    return columns if columns is None or len(columns) == 1 else columns[experts]


def _numpy_sums(
    weight: mx.array, sums_of: Callable[[np.ndarray, slice], np.ndarray], count: int
) -> np.ndarray:
    """Sums over the rows of a weight, some at a time.

    Args:
        weight: (experts, rows, columns).
        sums_of: from some raw rows (experts, rows, columns) and the slice of their experts to
            `count` sums (count, experts, rows).
        count: how many.

    Returns:
        float64 (count, experts, rows).
    """
    raw = raw_rows(weight).reshape(weight.shape)
    totals = np.zeros((count, *weight.shape[:2]))

    def work(experts: slice, rows: slice) -> None:
        totals[:, experts, rows] = sums_of(raw[experts, rows], experts)

    in_threads(work, _chunks(CHUNK_OF_NUMPY, *weight.shape), WORKERS)
    return totals


def _by_error(totals: np.ndarray, count: int) -> RowErrors:
    """Totals of weights and errors, (count, experts, rows) or twice as many, by name."""
    if len(totals) == count:
        return RowErrors(totals[1:], totals[0])
    return RowErrors(totals[1:count], totals[0], totals[count + 1 :], totals[count])


def _errors_by_mlx(
    weight: mx.array, configs: Sequence[QuantConfig], columns: np.ndarray | None
) -> RowErrors:
    """`row_errors` as MLX itself quantizes and restores."""
    roots = None if columns is None else mx.array(np.sqrt(columns, dtype=np.float32)[:, None])

    def terms(chunk: Chunk) -> list[mx.array]:
        rows = weight[chunk]
        exact = rows.astype(mx.float32)
        results = [exact]
        for c in configs:
            packed = mx.quantize(rows, c.group_size, c.bits, mode=c.mode)
            restored = mx.dequantize(*packed, group_size=c.group_size, bits=c.bits, mode=c.mode)
            results.append(exact - restored.astype(mx.float32))
        if roots is None:
            return results
        root = roots if len(roots) == 1 else roots[chunk[0]]
        return results + [result * root for result in results]

    count = 1 + len(configs)
    totals = _row_sums(weight, terms, count if roots is None else 2 * count)
    return _by_error(totals, count)


def row_ranges(weight: mx.array, group_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How wide the groups of each row are, and how large its weights.

    Args:
        weight: (experts, rows, columns).
        group_sizes: ascending, each a multiple of the first, all dividing the columns.

    Returns:
        float64 (group sizes, experts, rows), sums over a row's groups of (max - min)^2; and
        (experts, rows), sums of squares.
    """
    if on_cpu() and group_sizes and group_sizes[0] == min(AFFINE_GROUPS):
        sums = _numpy_sums(
            weight, lambda rows, _: range_sums(rows, group_sizes), 1 + len(group_sizes)
        )
        if np.isfinite(sums[0]).all():
            return sums[1:], sums[0]

    def terms(chunk: Chunk) -> list[mx.array]:
        exact = weight[chunk].astype(mx.float32)
        groups = exact.reshape(*exact.shape[:-1], -1, group_sizes[0])
        high, low = mx.max(groups, axis=-1), mx.min(groups, axis=-1)
        results = [exact]

        # The range of a larger group follows from those of the smallest groups in it.
        for size in group_sizes:
            shape = (*exact.shape[:-1], -1, size // group_sizes[0])
            widest = mx.max(high.reshape(shape), axis=-1) - mx.min(low.reshape(shape), axis=-1)
            results.append(widest)
        return results

    totals = _row_sums(weight, terms, 1 + len(group_sizes))
    return totals[1:], totals[0]


def _row_sums(weight: mx.array, terms: Callable[[Chunk], list[mx.array]], count: int) -> np.ndarray:
    """Sums of squares over the rows of a weight, in chunks, as many at once as there are streams.

    Args:
        weight: (experts, rows, columns).
        terms: from the slices of a chunk to `count` arrays, float32 (experts, rows, n) each, whose
            squares are summed.
        count: how many.

    Returns:
        float64 (count, experts, rows).
    """
    totals = np.zeros((count, *weight.shape[:2]))
    streams = working()
    chunks = list(_chunks(CHUNK, *weight.shape))
    for start in range(0, len(chunks), len(streams)):
        batch = chunks[start : start + len(streams)]
        results = []
        for stream, chunk in zip(streams, batch, strict=False):
            with mx.stream(stream):
                results.append([_squares(array) for array in terms(chunk)])
        mx.eval(results)
        for (experts, rows), result in zip(batch, results, strict=True):
            for index, array in enumerate(result):
                totals[index, experts, rows] = np.asarray(array)
            if not np.isfinite(totals[0, experts, rows]).all():
                totals[:, experts, rows] = _exact_sums(terms((experts, rows)))
    return totals


def _exact_sums(terms: list[mx.array]) -> np.ndarray:
    """Sums of squares in float64: those of finite weights above 1e18 are beyond float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.stack(
            [np.square(np.array(term, dtype=np.float64)).sum(axis=-1) for term in terms]
        )


def _squares(x: mx.array) -> mx.array:
    """Sum of squares of each row of a float32 array."""
    return mx.sum(mx.square(x), axis=-1)


def _chunks(size: int, experts: int, rows: int, columns: int) -> Iterator[Chunk]:
    """Slices over experts and rows that hold about so many weights each."""
    per_expert = max(1, size // (rows * columns))
    per_row = rows if per_expert > 1 else max(1, size // columns)
    for e in range(0, experts, per_expert):
        for r in range(0, rows, per_row):
            yield slice(e, min(e + per_expert, experts)), slice(r, min(r + per_row, rows))
