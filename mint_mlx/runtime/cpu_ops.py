"""Dense products in place of those that MLX's CPU backend is slow at: quantized and of experts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwiGLU, SwitchLinear

from ..base.threads import in_threads, single_blas
from . import patching
from .device import on_cpu
from .fast_math import sigmoid

WORKERS = 16  # threads at most
PIECE = 1 << 22  # products of numbers in a piece of a thread's work
Present = tuple[int, int, int]  # an expert, the first of its rows, their end


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
        out = _grouped_product(rows, self["weight"], expert, is_sorted=sorted_indices)
        if "bias" in self:
            out = out + self["bias"][mx.array(expert)]
        return out.reshape(*lead, 1, -1)


def whole_experts() -> AbstractContextManager[None]:
    """Run groups of experts whole in numpy on a CPU, where nothing watches their layers.

    Without gradients. For a few tokens most of the time goes from one operation to the next.
    """
    return patching.experts_computed_by(_whole_or_stock) if on_cpu() else nullcontext()


def _whole_or_stock(stock: patching.Call) -> patching.Call:
    """A group of experts in numpy where it is the usual one, else `stock`."""

    def call(group: Any, x: mx.array, indices: mx.array) -> mx.array:
        layers = group.up_proj, group.gate_proj, group.down_proj
        is_usual = type(group.activation) is SwiGLU and x.dtype == mx.float32
        if not is_usual or any(type(a) is not GroupedSwitchLinear or "bias" in a for a in layers):
            return cast(mx.array, stock(group, x, indices))
        chosen = np.asarray(indices)
        rows = np.asarray(x).reshape(-1, x.shape[-1])
        out = _swiglu_experts(rows, chosen.reshape(len(rows), -1), *(a.weight for a in layers))
        return mx.array(out.reshape(*chosen.shape, -1))

    return call


def _swiglu_experts(
    rows: np.ndarray, chosen: np.ndarray, up: mx.array, gate: mx.array, down: mx.array
) -> np.ndarray:
    """What each token's experts return.

    Args:
        rows: float32 (tokens, hidden).
        chosen: int (tokens, k), experts.
        up, gate: float32 (experts, inner, hidden).
        down: float32 (experts, hidden, inner).

    Returns:
        float32 (tokens * k, hidden).
    """
    expert = chosen.reshape(-1)
    order = np.argsort(expert, kind="stable")
    present = _present(expert[order], len(up))
    read = rows[order // chosen.shape[1]]
    to_gate, to_up, to_down = (np.asarray(a).swapaxes(1, 2) for a in (gate, up, down))
    inner = _products(read, to_gate, present)
    inner *= sigmoid(inner)
    inner *= _products(read, to_up, present)

    out = np.empty_like(read)
    out[order] = _products(inner, to_down, present)
    return out


def _present(expert: np.ndarray, experts: int) -> list[Present]:
    """The experts that sorted rows go to."""
    edges = np.searchsorted(expert, np.arange(experts + 1)).tolist()
    return [(e, start, stop) for e, (start, stop) in enumerate(pairwise(edges)) if start < stop]


def _grouped_product(
    rows: mx.array, weight: mx.array, expert: np.ndarray, is_sorted: bool
) -> mx.array:
    """Each row times its expert's weight.

    Args:
        rows: (n, in).
        weight: (experts, out, in).
        expert: int (n,).
        is_sorted: whether experts rise.

    Returns:
        (n, out). Its gradient is made of the same products; MLX's own of so many slices adds up as
        many arrays of full size. Rows are brought into order in here, as MLX's gradient of that
        adds them up one by one.
    """
    order = None if is_sorted else np.argsort(expert, kind="stable")
    present = _present(expert if order is None else expert[order], len(weight))

    def in_order(rows: mx.array) -> np.ndarray:
        values = np.asarray(rows)
        return values if order is None else values[order]

    def back(rows: np.ndarray) -> mx.array:
        if order is None:
            return mx.array(rows)
        out = np.empty_like(rows)
        out[order] = rows
        return mx.array(out)

    @mx.custom_function
    def product(rows: mx.array, weight: mx.array) -> mx.array:
        return back(_products(in_order(rows), np.asarray(weight).swapaxes(1, 2), present))

    @product.vjp
    def _(
        primals: tuple[mx.array, mx.array], grad: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        weight = primals[1]
        rows, slopes = (in_order(array) for array in (primals[0], grad))
        to_rows = back(_products(slopes, np.asarray(weight), present))

        # MLX's, as it is computed only where it is asked for.
        x, to_out = mx.array(rows), mx.array(slopes)
        to_present = {e: to_out[start:stop].T @ x[start:stop] for e, start, stop in present}
        to_absent = mx.zeros(weight.shape[1:], weight.dtype)
        return to_rows, mx.stack([to_present.get(e, to_absent) for e in range(weight.shape[0])])

    return cast(mx.array, product(rows, weight))


def _products(rows: np.ndarray, weight: np.ndarray, present: list[Present]) -> np.ndarray:
    """Each row times its expert's matrix, several experts side by side.

    Args:
        rows: float32 (n, in), sorted by expert.
        weight: float32 (experts, in, out).
        present: the experts that have rows.

    Returns:
        float32 (n, out).
    """
    out = np.empty((len(rows), weight.shape[2]), dtype=np.float32)

    def work(some: list[Present]) -> None:
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
