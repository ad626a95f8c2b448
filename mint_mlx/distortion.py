"""The error that a configuration makes in weights: that of `mx.quantize` and `mx.dequantize` themselves.

    NMSE = ||W - Q(W)||^2 / ||W||^2

A group never spans two rows, so errors are summed row by row, and a sample of rows tells of the whole (sample.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .quant import QuantConfig

CHUNK = 1 << 22  # weights measured at once: small enough for the CPU's cache, large enough for the GPU


def measure(weight: Any, configs: Sequence[QuantConfig]) -> tuple[np.ndarray, np.ndarray]:
    """NMSE of each configuration for each expert of one layer, and each expert's sum of squares.

    Args:
        weight: mx.array (..., rows, columns) in the type it will be quantized in; leading axes are experts or heads.
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

    experts, rows, columns = weight.shape
    errors, energy = np.zeros((len(configs), experts, rows)), np.zeros((experts, rows))
    streams = _streams()
    for chosen, part in _chunks(experts, rows, columns):
        w = weight[chosen, part]
        exact = w.astype(mx.float32)
        mx.eval(w, exact)
        results = []
        for index, config in enumerate(configs):
            with mx.stream(streams[index % len(streams)]):
                packed = mx.quantize(w, config.group_size, config.bits, mode=config.mode)
                restored = mx.dequantize(*packed, group_size=config.group_size, bits=config.bits, mode=config.mode)
                results.append(_squares(exact - restored.astype(mx.float32)))
        with mx.stream(streams[0]):
            results.append(_squares(exact))
        mx.eval(results)
        energy[chosen, part] = np.asarray(results.pop())
        for index, result in enumerate(results):
            errors[index, chosen, part] = np.asarray(result)
    return errors, energy


def row_ranges(weight: Any, group_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How wide the groups of each row are, and how large its weights.

    Args:
        weight: mx.array (experts, rows, columns).
        group_sizes: ascending, each a multiple of the first, all dividing the columns.

    Returns:
        float64 (group sizes, experts, rows), sums over a row's groups of (max - min)^2; and (experts, rows), sums of
        squares.
    """
    import mlx.core as mx

    experts, rows, columns = weight.shape
    ranges, energy = np.zeros((len(group_sizes), experts, rows)), np.zeros((experts, rows))
    for chosen, part in _chunks(experts, rows, columns):
        exact = weight[chosen, part].astype(mx.float32)
        groups = exact.reshape(*exact.shape[:-1], -1, group_sizes[0])
        high, low = mx.max(groups, axis=-1), mx.min(groups, axis=-1)
        results = []
        for size in group_sizes:
            shape = (*exact.shape[:-1], -1, size // group_sizes[0])
            results.append(_squares(mx.max(high.reshape(shape), axis=-1) - mx.min(low.reshape(shape), axis=-1)))
        mx.eval(results, energies := _squares(exact))
        energy[chosen, part] = np.asarray(energies)
        for index, result in enumerate(results):
            ranges[index, chosen, part] = np.asarray(result)
    return ranges, energy


@lru_cache(maxsize=1)
def _streams() -> tuple[Any, ...]:
    """Where configurations are measured side by side: MLX computes a CPU stream in one thread, so two of them there."""
    import mlx.core as mx

    if mx.default_device() == mx.gpu:
        return (mx.default_stream(mx.gpu),)
    return (mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))


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
