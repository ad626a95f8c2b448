"""What MLX's CPU backend on Linux is slow at, done with numpy and dense products instead. Nothing here runs on a GPU.

Its exponential is not vectorised there (80 M/s; numpy's is ten times faster), which makes softmax the cost of attention
and of every score; its `gather_mm` takes float32 only and multiplies row by row.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu as stock_swiglu
from mlx_lm.models.switch_layers import SwitchLinear

from .switch import rows_and_experts

BLOCK = 192  # queries of attention at once
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


def exp(x: mx.array) -> mx.array:
    """exp of a float32 array."""
    return mx.array(np.exp(np.asarray(x))) if on_cpu() else mx.exp(x)


def logsumexp(x: mx.array) -> mx.array:
    """log of the sum of exp over the last axis of a float32 array, the axis kept."""
    if not on_cpu():
        return mx.logsumexp(x, axis=-1, keepdims=True)
    values = np.asarray(x)
    most = values.max(axis=-1, keepdims=True)
    return mx.array(most + np.log(np.exp(values - most).sum(axis=-1, keepdims=True)))


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


@contextmanager
def fast_math(model: nn.Module) -> Iterator[None]:
    """Compute a model's causal attention and SwiGLU with numpy's exponential, for a moment."""
    if not on_cpu():
        yield
        return
    stock = mx.fast.scaled_dot_product_attention

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **more: Any) -> mx.array:
        plain = isinstance(mask, str) and mask == "causal" and not any(value is not None for value in more.values())
        if not plain or q.shape[-2] != k.shape[-2] or q.dtype != mx.float32:
            return stock(q, k, v, scale=scale, mask=mask, **more)
        return _causal(q, k, v, scale)

    modules = {sys.modules[type(m).__module__] for m in model.modules()}
    users = [module for module in modules if getattr(module, "swiglu", None) is stock_swiglu]
    mx.fast.scaled_dot_product_attention = attention
    for module in users:
        module.swiglu = _swiglu  # type: ignore[attr-defined]
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = stock
        for module in users:
            module.swiglu = stock_swiglu  # type: ignore[attr-defined]


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32:
        return stock_swiglu(gate, x)
    values = np.array(gate)
    below = np.negative(values)
    np.minimum(below, 80.0, out=below)  # silu is zero there, and exp stays finite
    np.exp(below, out=below)
    below += 1
    values /= below
    values *= np.asarray(x)
    return mx.array(values)


def _causal(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention: q (batch, heads, n, d), k and v with as many heads or a divisor of them."""
    batch, heads, length, _ = q.shape
    shared = heads // k.shape[1]  # heads that share keys and values form one tall product
    grouped = (q * scale).reshape(batch, k.shape[1], shared, length, -1)
    keys = k.swapaxes(-1, -2)
    parts = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        scores = grouped[..., start:stop, :].reshape(batch, k.shape[1], shared * (stop - start), -1) @ keys[..., :stop]
        mx.eval(scores)
        _softmax(np.asarray(scores).reshape(-1, stop - start, stop), start)  # in place: nobody else holds the scores
        part = scores @ v[..., :stop, :]
        parts.append(part.reshape(batch, heads, stop - start, -1))
    return mx.concatenate(parts, axis=-2)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _softmax(rows: np.ndarray, start: int) -> None:
    """Softmax over the last axis of (n, queries, columns) in place, where query i may see columns up to start + i."""
    hidden = np.triu(np.full((rows.shape[1],) * 2, -np.inf, dtype=np.float32), 1)

    def work(part: np.ndarray) -> None:
        part[..., start:] += hidden
        part -= part.max(axis=-1, keepdims=True)
        np.exp(part, out=part)
        part /= part.sum(axis=-1, keepdims=True)

    list(_pool().map(work, np.array_split(rows, 2 * (os.cpu_count() or 1))))
