"""Dense products in place of those that MLX's CPU backend is slow at: quantized and of experts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from ..base.threads import in_threads, single_blas
from . import patching
from .device import on_cpu

WORKERS = 16  # threads at most
PIECE = 1 << 22  # products of numbers in a piece of a thread's work


def dense_products() -> AbstractContextManager[None]:
    """Let MLX's quantized products on a CPU dequantize and multiply, while the context is open.

    The same but for rounding, gradients of scales and biases too, and 20 times as fast (a head of
    32,000 by 288).
    """
    if not on_cpu():
        return nullcontext()
    return patching.quantized_products(_dense_matmul, _dense_gather)


def _dense_matmul(x: mx.array, *packed: Any, **options: Any) -> mx.array:
    """As `mx.quantized_matmul`."""
    return x @ _restored(*packed, **options)


def _dense_gather(
    x: mx.array,
    *packed: Any,
    rhs_indices: mx.array,
    sorted_indices: bool = False,
    **options: Any,
) -> mx.array:
    """As `mx.gather_qmm`, for indices of the weights alone."""
    weight = _restored(*packed, **options)
    return mx.gather_mm(x, weight, rhs_indices=rhs_indices, sorted_indices=sorted_indices)


def _restored(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    **options: Any,
) -> mx.array:
    """The weight (..., columns, rows), or (..., rows, columns) where it is not to be transposed."""
    weight = mx.dequantize(w, scales, biases, **options)
    return weight.swapaxes(-1, -2) if transpose else weight


class GroupedSwitchLinear(SwitchLinear):
    """A SwitchLinear that multiplies each expert's tokens with one dense product."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As SwitchLinear: x (..., 1, in) against indices (..., k) gives (..., k, 1, out)."""
        lead, rows, expert = rows_and_experts(x, indices)
        order = None if sorted_indices else np.argsort(expert, kind="stable")
        if order is not None:
            rows = rows[mx.array(order)]
            expert = expert[order]

        out = _grouped_product(rows, self["weight"], expert)
        if "bias" in self:
            out = out + self["bias"][mx.array(expert)]

        if order is not None:
            out = out[mx.array(np.argsort(order, kind="stable"))]
        return out.reshape(*lead, 1, -1)


def _grouped_product(rows: mx.array, weight: mx.array, expert: np.ndarray) -> mx.array:
    """Each row times its expert's weight.

    Args:
        rows: (n, in), sorted by expert.
        weight: (experts, out, in).
        expert: int (n,).

    Returns:
        (n, out). Its gradient is made of the same products; MLX's own of so many slices adds up as
        many arrays of full size.
    """
    edges = np.searchsorted(expert, np.arange(len(weight) + 1)).tolist()
    present = [(e, start, stop) for e, (start, stop) in enumerate(pairwise(edges)) if start < stop]

    @mx.custom_function
    def product(rows: mx.array, weight: mx.array) -> mx.array:
        values = np.asarray(rows), np.asarray(weight).swapaxes(1, 2)
        return mx.array(_products(*values, present))

    @product.vjp
    def _(
        primals: tuple[mx.array, mx.array], grad: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        rows, weight = primals
        to_present = {e: grad[start:stop].T @ rows[start:stop] for e, start, stop in present}
        to_absent = mx.zeros(weight.shape[1:], weight.dtype)
        to_weight = mx.stack([to_present.get(e, to_absent) for e in range(weight.shape[0])])
        return mx.array(_products(np.asarray(grad), np.asarray(weight), present)), to_weight

    return cast(mx.array, product(rows, weight))


def _products(
    rows: np.ndarray, weight: np.ndarray, present: list[tuple[int, int, int]]
) -> np.ndarray:
    """Each row times its expert's matrix, several experts side by side.

    Args:
        rows: float32 (n, in), sorted by expert.
        weight: float32 (experts, in, out).
        present: (expert, first row, end of its rows).

    Returns:
        float32 (n, out).
    """
    out = np.empty((len(rows), weight.shape[2]), dtype=np.float32)

    def work(some: list[tuple[int, int, int]]) -> None:
        for expert, start, stop in some:
            np.matmul(rows[start:stop], weight[expert], out=out[start:stop])

    # What a thread takes at a time is large beside what it costs to hand it over.
    pieces = len(rows) * weight[0].size // PIECE
    if pieces < 2:
        work(present)
        return out
    each = max(1, len(present) // pieces)
    with single_blas():
        in_threads(work, ((present[i : i + each],) for i in range(0, len(present), each)), WORKERS)
    return out


def rows_and_experts(
    x: mx.array, indices: mx.array | np.ndarray
) -> tuple[tuple[int, ...], mx.array, np.ndarray]:
    """The arguments of an expert layer's call as single rows, each with the expert it goes to.

    Args:
        x: (..., 1, inputs), broadcast against `indices`.
        indices: int (..., k).

    Returns:
        Their common shape, whose product is n; rows (n, inputs); experts, int (n,). The call's
        output is (*shape, 1, outputs).
    """
    lead = np.broadcast_shapes(indices.shape, x.shape[:-2])
    rows = mx.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, x.shape[-1])
    return lead, rows, np.broadcast_to(np.asarray(indices), lead).reshape(-1)
