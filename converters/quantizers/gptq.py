"""Error feedback: each column's rounding error is passed on to the columns that are not rounded
yet.

GPTQ (Frantar et al., 2022), in the form of LDLQ (Chee et al., 2023, who show that both are the
same), which needs no inverse. With the model's own weighting: what is minimised is the error at the
layer's output times how much the model minds it, so the second moment of the inputs is `E[|g|^2 x
x^T]`, with x and the output gradient g from tokens that the model wrote itself. Columns go by
falling diagonal, on the grids that rounding to nearest has, which allows any bit width and group
size. The experts of a layer are treated apart; one that was rarely chosen borrows from all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from ...base.quant_config import QuantConfig
from ...checkpoint.layers import Layer
from ...measure.moments import factor
from . import rtn
from .codes import Codes

WIDE = 8192  # rows, of one expert or of several, whose columns are rounded together
WORKERS = 4  # threads at most: each holds the second moments and factors of WIDE rows' experts
Place = tuple[slice, slice]  # experts and rows of a layer


class SecondMoments(Protocol):
    """What gives second moments by expert: an array, or what makes them as they are asked for
    (inputs.py).
    """

    def __getitem__(self, experts: slice, /) -> np.ndarray: ...


def quantize(
    weight: mx.array, config: QuantConfig, moments: SecondMoments | None = None
) -> dict[str, mx.array]:
    """Quantize one layer.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        config: a quantized configuration whose group divides the columns.
        moments: gives float32 (experts, columns, columns) for a slice of experts, the weighted
            second moment of each one's inputs; None where there is none, which is rounded to
            nearest, as the mx modes are.

    Returns:
        `weight` (uint32, packed), `scales`, and `biases` where the mode has them.
    """
    if moments is None or config.mode != "affine":
        return rtn.quantize(weight, config)
    return find_codes(weight, config, moments).packed()


def find_codes(weight: mx.array, config: QuantConfig, moments: SecondMoments) -> Codes:
    """As `quantize`, for an affine configuration, before packing."""
    plain = rtn.quantize(weight, config)  # its grids are kept
    arrays = [a.reshape(-1, *a.shape[-2:]) for a in (weight, plain["scales"], plain["biases"])]
    experts, rows, _ = arrays[0].shape
    codes = np.empty(arrays[0].shape, dtype=np.uint8)
    if experts == 1:  # one factor, made by all threads of the BLAS
        alone = _feedback(moments[:])
    else:
        moments[:0]  # what all experts share is made before several threads ask for it

    def work(here: Place, weight: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> None:
        orders, passed = alone if experts == 1 else _feedback(moments[here[0]])
        codes[here] = _feed_back(weight, scales, biases, orders, passed, config)

    pieces = (
        (here, *(np.array(a[here].astype(mx.float32)) for a in arrays))
        for here in _places(experts, rows)
    )
    _side_by_side(work, pieces)
    return Codes(config, codes.reshape(weight.shape), plain["scales"], plain["biases"])


def held(layer: Layer) -> int:
    """Bytes that error feedback takes while it rounds a layer."""
    experts, rows, columns = layer.experts, layer.shape[-2], layer.shape[-1]
    together, wide = (
        len(range(n)[part])
        for n, part in zip((experts, rows), _places(experts, rows)[0], strict=True)
    )
    square = (
        4 * columns**2
    )  # a moment and a factor, or one more while that is made; weights, shifted ones and errors
    return _cores() * together * (3 * square + 4 * 4 * wide * columns)


def _places(experts: int, rows: int) -> list[Place]:
    """How a layer is cut: between experts, or where there is one between its rows, which don't
    depend on each other.
    """
    if experts > 1:
        return [(some, slice(None)) for some in _cut(experts, max(1, WIDE // rows))]
    return [(slice(None), some) for some in _cut(rows, max(1024, min(WIDE, -(-rows // WORKERS))))]


def _cut(count: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, count, step)]


def _cores() -> int:
    return min(WORKERS, os.cpu_count() or 1)


def _side_by_side(work: Callable[..., None], pieces: Iterable[tuple[Any, ...]]) -> None:
    """Do the work on each piece in threads, of which each calls a BLAS of one thread: several would
    wait for it.
    """
    pool, running = _pool(), deque[Future[None]]()
    with threadpool_limits(1, "blas"):
        for piece in pieces:
            running.append(pool.submit(work, *piece))
            if len(running) > _cores():
                running.popleft().result()
        for rest in running:
            rest.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores())  # kept, as MLX makes a stream for each thread


def _feedback(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In which order the columns of each expert go, and what each takes over from the errors of
    those before it.

    Returns:
        int (experts, columns), columns by rising diagonal of the moment H, of which the last goes
        first; and float32 (experts, columns, columns) with ones on the diagonal and nothing above:
        the factor L of the reordered, damped H = L D L^T.
    """
    orders, passed = np.empty(moments.shape[:2], dtype=np.int64), np.empty_like(moments)
    for moment, order, into in zip(moments, orders, passed, strict=True):
        order[:], lower = factor(moment)
        np.multiply(lower, 1 / np.diagonal(lower), out=into)
    return orders, passed


def _feed_back(
    weight: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    orders: np.ndarray,
    passed: np.ndarray,
    config: QuantConfig,
) -> np.ndarray:
    """Codes uint8 (experts, rows, columns) of matrices on fixed grids; `orders` and `passed` by
    `_feedback`.

    All that follows has columns first, in their order.
    """
    experts, rows, columns = weight.shape
    each = np.arange(experts)
    group = orders // config.group_size
    scales = np.where(
        scales == 0, np.float32(1), scales
    )  # a group whose range is nothing in 16 bits: its bias is all
    by_group = [np.ascontiguousarray(array.transpose(2, 0, 1)) for array in (scales, biases)]
    exact = np.empty((columns, experts, rows), dtype=np.float32)
    for e in each:
        exact[:, e] = np.ascontiguousarray(weight[e].T)[orders[e]]
    shifted, errors = exact.copy(), np.empty_like(exact)
    codes, rounded = np.empty(weight.shape, dtype=np.uint8), np.empty(exact.shape, dtype=np.uint8)
    top = 2**config.bits - 1

    for start, middle, stop in _halves(0, columns):
        if stop - start > 1:
            factor = passed[:, middle:stop, start:middle].transpose(0, 2, 1)
            shifted[start:middle] += np.matmul(
                factor, errors[middle:stop].transpose(1, 0, 2)
            ).transpose(1, 0, 2)
            continue
        scale, bias = (array[group[:, start], each] for array in by_group)
        code = shifted[start]
        code -= bias
        code /= scale
        np.clip(np.rint(code, out=code), 0, top, out=code)
        rounded[start] = code
        code *= scale
        code += bias
        np.subtract(exact[start], code, out=errors[start])
    for e in each:
        inverse = np.empty_like(orders[e])
        inverse[orders[e]] = np.arange(columns)
        codes[e] = rounded[:, e][inverse].T
    return codes


def _halves(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """In which order columns are rounded, the last first: the upper half, what it passes on, then
    the lower half.

    Yields:
        (start, middle, stop) where the columns from middle to stop pass their errors on to those
        from start to middle; (start, start, start + 1) where a column is rounded.
    """
    middle = (start + stop) // 2
    if stop - start > 1:
        yield from _halves(middle, stop)
    yield start, middle, stop
    if stop - start > 1:
        yield from _halves(start, middle)
