"""What MLX's CPU backend on Linux needs: experts with dense products, as its `gather_mm` multiplies row by row."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from itertools import pairwise

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from .switch import rows_and_experts

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device() != mx.gpu)


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of giving it back: MLX's large arrays else fault in anew page by page.

    A third of the time of a backward pass, for a twentieth more of peak memory (measured on Qwen3-30B's shapes).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and on_cpu() else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


class GroupedSwitchLinear(SwitchLinear):
    """A SwitchLinear that multiplies each expert's tokens with one dense product."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As SwitchLinear: x (..., 1, in) broadcast against indices (..., k); returns (..., k, 1, out)."""
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
        (n, out). Its gradient is made of products alike; MLX's own of so many slices adds as many arrays of full size.
    """
    edges = np.searchsorted(expert, np.arange(len(weight) + 1)).tolist()
    present = [(e, start, stop) for e, (start, stop) in enumerate(pairwise(edges)) if start < stop]

    @mx.custom_function
    def product(rows: mx.array, weight: mx.array) -> mx.array:
        if not present:
            return mx.zeros((0, weight.shape[1]), rows.dtype)
        return mx.concatenate([rows[start:stop] @ weight[e].T for e, start, stop in present])

    @product.vjp
    def _(primals: tuple[mx.array, mx.array], grad: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        rows, weight = primals
        parts = {e: grad[start:stop].T @ rows[start:stop] for e, start, stop in present}
        nothing = mx.zeros(weight.shape[1:], weight.dtype)
        to_rows = [grad[start:stop] @ weight[e] for e, start, stop in present]
        back = mx.concatenate(to_rows) if to_rows else mx.zeros_like(rows)
        return back, mx.stack([parts.get(e, nothing) for e in range(weight.shape[0])])

    made = product(rows, weight)
    assert isinstance(made, mx.array)
    return made
