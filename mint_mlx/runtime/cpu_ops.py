"""What MLX's CPU backend on Linux needs: dense products in place of quantized ones, and of
`gather_mm`'s row by row.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from .patching import Call, wrapped

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device() != mx.gpu)


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of giving it back: MLX's large arrays else fault in
    anew page by page.

    A third of the time of a backward pass, for a twentieth more of peak memory (measured on
    Qwen3-30B's shapes)."""
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None)
        if sys.platform == "linux" and on_cpu()
        else None
    )
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


@contextmanager
def dense_products() -> Iterator[None]:
    """Let MLX's quantized products dequantize and multiply, on a CPU, for a moment.

    The same but for rounding, gradients of scales and biases too, and 20 times as fast (a head of
    32,000 by 288)."""
    if not on_cpu():
        yield
        return

    def restored(
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        transpose: bool = True,
        **how: Any,
    ) -> mx.array:
        weight = mx.dequantize(w, scales, biases, **how)
        return weight.swapaxes(-1, -2) if transpose else weight

    def linear(_: Call) -> Call:
        return lambda x, *packed, **how: x @ restored(*packed, **how)

    def experts(_: Call) -> Call:
        def product(
            x: mx.array,
            *packed: Any,
            rhs_indices: mx.array,
            sorted_indices: bool = False,
            **how: Any,
        ) -> Any:
            return mx.gather_mm(
                x, restored(*packed, **how), rhs_indices=rhs_indices, sorted_indices=sorted_indices
            )

        return product

    with wrapped(mx, linear, "quantized_matmul"), wrapped(mx, experts, "gather_qmm"):
        yield


class GroupedSwitchLinear(SwitchLinear):
    """A SwitchLinear that multiplies each expert's tokens with one dense product."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As SwitchLinear: x (..., 1, in) broadcast against indices (..., k); returns (..., k, 1,
        out).
        """
        lead, rows, expert = rows_and_experts(x, indices)
        order = None if sorted_indices else np.argsort(expert, kind="stable")
        if order is not None:
            rows, expert = rows[mx.array(order)], expert[order]
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
        (n, out). Its gradient is made of products alike; MLX's own of so many slices adds as many
        arrays of full size.
    """
    edges = np.searchsorted(expert, np.arange(len(weight) + 1)).tolist()
    present = [(e, start, stop) for e, (start, stop) in enumerate(pairwise(edges)) if start < stop]

    @mx.custom_function
    def product(rows: mx.array, weight: mx.array) -> mx.array:
        if not present:
            return mx.zeros((0, weight.shape[1]), rows.dtype)
        return mx.concatenate([rows[start:stop] @ weight[e].T for e, start, stop in present])

    @product.vjp
    def _(
        primals: tuple[mx.array, mx.array], grad: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        rows, weight = primals
        parts = {e: grad[start:stop].T @ rows[start:stop] for e, start, stop in present}
        nothing = mx.zeros(weight.shape[1:], weight.dtype)
        to_rows = [grad[start:stop] @ weight[e] for e, start, stop in present]
        back = mx.concatenate(to_rows) if to_rows else mx.zeros_like(rows)
        return back, mx.stack([parts.get(e, nothing) for e in range(weight.shape[0])])

    made = product(rows, weight)
    assert isinstance(made, mx.array)
    return made


def rows_and_experts(x: mx.array, indices: Any) -> tuple[tuple[int, ...], mx.array, np.ndarray]:
    """The arguments of a call as single rows, each with the expert that it goes to.

    Args:
        x: (..., 1, inputs), broadcast against `indices`.
        indices: int (..., k), of MLX or numpy.

    Returns:
        Their common shape, whose product is n; rows (n, inputs); experts, int (n,). The call's
        output is (*shape, 1, outputs).
    """
    lead = np.broadcast_shapes(indices.shape, x.shape[:-2])
    rows = mx.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, x.shape[-1])
    return lead, rows, np.broadcast_to(np.asarray(indices), lead).reshape(-1)
