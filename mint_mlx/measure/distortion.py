"""The error that a configuration makes in weights: that of `mx.quantize` and `mx.dequantize`
themselves.

    NMSE = ||W - Q(W)||^2 / ||W||^2

A group never spans two rows, so errors are summed row by row, and a sample of rows tells of the
whole (sample.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..base.quant_config import QuantConfig
from ..base.streams import working

CHUNK = (
    1 << 19
)  # weights measured at once: small enough for the CPU's cache, large enough for the GPU


def measure(weight: Any, configs: Sequence[QuantConfig]) -> tuple[np.ndarray, np.ndarray]:
    """NMSE of each configuration for each expert of one layer, and each expert's sum of squares.

    Args:
        weight: mx.array (..., rows, columns) in the type it will be quantized in; leading axes are
            experts or heads.
        configs: quantized configurations whose groups divide the last axis.

    Returns:
        float64 (configs, experts) and (experts,).
    """
    errors, energy = (sums.sum(axis=-1) for sums in row_errors(as_experts(weight), configs))
    # An expert of zeros is restored exactly: its error is zero, not undefined.
    return errors / np.where(energy > 0, energy, 1), energy


def as_experts(weight: Any) -> Any:
    """A weight (..., rows, columns) as (experts, rows, columns)."""
    return weight.reshape(-1, *weight.shape[-2:])


def row_errors(weight: Any, configs: Sequence[QuantConfig]) -> tuple[np.ndarray, np.ndarray]:
    """Squared error of each row under each configuration, and each row's sum of squares.

    Args:
        weight: mx.array (experts, rows, columns).
        configs: as for `measure`.

    Returns:
        float64 (configs, experts, rows) and (experts, rows).
    """
    import mlx.core as mx

    errors, energy = np.zeros((len(configs), *weight.shape[:2])), np.zeros(weight.shape[:2])

    def sums(part: Any) -> list[Any]:

        exact = part.astype(mx.float32)
        found = [_squares(exact)]
        for c in configs:
            packed = mx.quantize(part, c.group_size, c.bits, mode=c.mode)
            restored = mx.dequantize(*packed, group_size=c.group_size, bits=c.bits, mode=c.mode)
            found.append(_squares(exact - restored.astype(mx.float32)))
        return found

    for place, found in _side_by_side(weight, sums):
        energy[place] = found[0]
        for index, result in enumerate(found[1:]):
            errors[index][place] = result
    return errors, energy


def row_ranges(weight: Any, group_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How wide the groups of each row are, and how large its weights.

    Args:
        weight: mx.array (experts, rows, columns).
        group_sizes: ascending, each a multiple of the first, all dividing the columns.

    Returns:
        float64 (group sizes, experts, rows), sums over a row's groups of (max - min)^2; and
        (experts, rows), sums of squares.
    """
    ranges, energy = np.zeros((len(group_sizes), *weight.shape[:2])), np.zeros(weight.shape[:2])

    def sums(part: Any) -> list[Any]:
        import mlx.core as mx

        exact = part.astype(mx.float32)
        groups = exact.reshape(*exact.shape[:-1], -1, group_sizes[0])
        high, low = mx.max(groups, axis=-1), mx.min(groups, axis=-1)
        found = [_squares(exact)]
        for size in group_sizes:
            shape = (*exact.shape[:-1], -1, size // group_sizes[0])
            found.append(
                _squares(mx.max(high.reshape(shape), axis=-1) - mx.min(low.reshape(shape), axis=-1))
            )
        return found

    for place, found in _side_by_side(weight, sums):
        energy[place] = found[0]
        for index, result in enumerate(found[1:]):
            ranges[index][place] = result
    return ranges, energy


def _side_by_side(
    weight: Any, sums: Callable[[Any], list[Any]]
) -> Iterator[tuple[tuple[slice, slice], list[np.ndarray]]]:
    """Work through a weight (experts, rows, columns) in chunks, as many at once as there are
    streams.
    """
    import mlx.core as mx

    chunks = list(_chunks(*weight.shape))
    for start in range(0, len(chunks), len(working())):
        some = chunks[start : start + len(working())]
        results = []
        for stream, place in zip(working(), some, strict=False):
            with mx.stream(stream):
                results.append(sums(weight[place]))
        mx.eval(results)
        for place, found in zip(some, results, strict=True):
            yield place, [np.asarray(result) for result in found]


def _squares(x: Any) -> Any:
    """Sum of squares of each row of a float32 array."""
    import mlx.core as mx

    return mx.sum(mx.square(x), axis=-1)


def _chunks(experts: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Slices over experts and rows that hold about CHUNK weights each."""
    per_expert = max(1, CHUNK // (rows * columns))
    per_row = rows if per_expert > 1 else max(1, CHUNK // columns)
    for e in range(0, experts, per_expert):
        for r in range(0, rows, per_row):
            yield slice(e, min(e + per_expert, experts)), slice(r, min(r + per_row, rows))
