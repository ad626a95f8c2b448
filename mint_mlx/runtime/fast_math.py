"""Attention, SwiGLU and log-sum-exp with numpy's exponential, for MLX's CPU backend on Linux.

MLX's own exponential is not vectorised there (80 M/s; numpy's is ten times faster), which makes it
the cost of attention and of every score, and a third of that of a step of learning. Gradients are
written out too. On a GPU all of this is MLX's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu as stock_swiglu

from ..base.threads import in_threads
from . import patching
from .device import on_cpu

QUERIES = 192  # of attention at once
# Numbers that a thread works on at once, so that they stay in its cache.
CHUNK = 1 << 17
DECODED = 1 << 19  # numbers of keys that a thread takes while tokens are decoded
WORKERS = 8  # threads at most, then
LARGEST = 80.0  # float32's exp is finite there


def fast_math(model: nn.Module) -> AbstractContextManager[None]:
    """Compute a model's causal attention and SwiGLU this way while the context is open."""
    if not on_cpu():
        return nullcontext()
    return patching.attention_and_swiglu(model, _attention_or_stock, swiglu)


def _attention_or_stock(stock: patching.Call) -> patching.Call:
    """`causal_attention` where it computes what is asked for, else MLX's `stock`."""

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
    ) -> mx.array:
        causal = isinstance(mask, str) and mask == "causal"
        plain = causal and all(value is None for value in options.values())
        if not plain or q.shape[-2] != k.shape[-2] or q.dtype != mx.float32:
            return stock(q, k, v, scale=scale, mask=mask, **options)
        return causal_attention(q, k, v, scale)

    return attention


def decoding_attention() -> AbstractContextManager[None]:
    """Compute one new token's attention to those before it in numpy, on a CPU; without gradients.

    MLX multiplies the keys once for each head that reads them, a row at a time.
    """
    return patching.attention_computed_by(_one_query_or_stock) if on_cpu() else nullcontext()


def _one_query_or_stock(stock: patching.Call) -> patching.Call:
    """`one_query` where it computes what is asked for, else `stock`."""

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
    ) -> mx.array:
        plain = mask is None and all(value is None for value in options.values())
        in_float32 = all(array.dtype == mx.float32 for array in (q, k, v))
        if not plain or q.shape[-2] != 1 or not in_float32:
            return cast(mx.array, stock(q, k, v, scale=scale, mask=mask, **options))
        return one_query(q, k, v, scale)

    return attention


def one_query(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Attention of one token to all of some, float32.

    Args:
        q: (batch, heads, 1, size).
        k, v: (batch, heads or a divisor of them, n, size).
        scale: of the scores.
    """
    keys, values = np.asarray(k), np.asarray(v)
    query = np.asarray(q).reshape(len(keys), keys.shape[1], -1, q.shape[-1]) * np.float32(scale)
    out = np.empty((*query.shape[:3], values.shape[-1]), dtype=np.float32)

    def work(some: slice) -> None:
        shares = np.matmul(query[some], keys[some].swapaxes(-1, -2))
        shares -= shares.max(axis=-1, keepdims=True)
        np.exp(shares, out=shares)
        shares /= shares.sum(axis=-1, keepdims=True)
        np.matmul(shares, values[some], out=out[some])

    step = max(1, len(keys) * DECODED // max(keys.size, 1))
    in_threads(work, ((slice(i, i + step),) for i in range(0, len(keys), step)), WORKERS)
    return mx.array(out.reshape(*q.shape[:3], -1))


def exp(x: mx.array) -> mx.array:
    """exp of a float32 array."""
    return mx.array(np.exp(np.asarray(x))) if on_cpu() else mx.exp(x)


def logsumexp(x: mx.array) -> mx.array:
    """log of the sum of exp over the last axis of a float32 array, the axis kept."""
    if not on_cpu():
        return mx.logsumexp(x, axis=-1, keepdims=True)
    return cast(mx.array, _logsumexp(x))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, arrays of one shape."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32 or gate.shape != x.shape:
        return stock_swiglu(gate, x)
    return cast(mx.array, _swiglu(gate, x))


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, float32.

    Args:
        q: (batch, heads, n, size).
        k, v: (batch, heads or a divisor of them, n, size).
        scale: of the scores.
    """

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        grouped = _grouped(q * scale, k)
        pieces = []
        for start, stop in _query_ranges(q):
            shares = _shares(grouped, k, start, stop)
            out = shares @ v[..., :stop, :]
            pieces.append(out.reshape(*q.shape[:2], -1, v.shape[-1]))
        return mx.concatenate(pieces, axis=-2)

    @attention.vjp
    def _(
        primals: tuple[mx.array, mx.array, mx.array], grad: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = primals
        grouped = _grouped(q * scale, k)
        grouped_grad = _grouped(grad, k)
        to_q: list[mx.array] = []
        to_k: mx.array | None = None
        to_v: mx.array | None = None
        # The last queries, which see all keys, come first.
        for start, stop in reversed(list(_query_ranges(q))):
            shares = _shares(grouped, k, start, stop)
            to_out = _flat(grouped_grad, start, stop)
            # The gradient of a softmax: its shares times what exceeds their weighted mean.
            to_shares = to_out @ v[..., :stop, :].swapaxes(-1, -2)
            mean = mx.sum(to_shares * shares, axis=-1, keepdims=True)
            to_scores = shares * (to_shares - mean)

            below = to_scores @ k[..., :stop, :] * scale
            to_q.insert(0, below.reshape(*q.shape[:2], stop - start, -1))
            to_k = _added(to_k, to_scores.swapaxes(-1, -2) @ _flat(grouped, start, stop))
            to_v = _added(to_v, shares.swapaxes(-1, -2) @ to_out)
        return mx.concatenate(to_q, axis=-2), cast(mx.array, to_k), cast(mx.array, to_v)

    return cast(mx.array, attention(q, k, v))


@mx.custom_function
def _logsumexp(x: mx.array) -> mx.array:
    values = _rows(x)
    out = np.empty((len(values), 1), dtype=np.float32)

    def work(out: np.ndarray, x: np.ndarray) -> None:
        largest = x.max(axis=-1, keepdims=True)
        np.log(np.exp(x - largest).sum(axis=-1, keepdims=True), out=out)
        out += largest

    in_chunks(work, out, values)
    return mx.array(out.reshape(*x.shape[:-1], 1))


@_logsumexp.vjp
def _(x: mx.array, grad: mx.array, total: mx.array) -> mx.array:
    values, slopes, totals = (_rows(array) for array in (x, grad, total))
    out = np.empty_like(values)

    def work(out: np.ndarray, x: np.ndarray, slope: np.ndarray, total: np.ndarray) -> None:
        np.exp(np.subtract(x, total, out=out), out=out)
        out *= slope

    in_chunks(work, out, values, slopes, totals)
    return mx.array(out.reshape(x.shape))


@mx.custom_function
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    gates = _rows(gate)
    out = np.empty_like(gates)

    def work(out: np.ndarray, gate: np.ndarray, x: np.ndarray) -> None:
        np.multiply(gate * sigmoid(gate), x, out=out)

    in_chunks(work, out, gates, _rows(x))
    return mx.array(out.reshape(gate.shape))


@_swiglu.vjp
def _(primals: tuple[mx.array, mx.array], grad: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, x, slope = (_rows(array) for array in (*primals, grad))
    to_gate = np.empty_like(gate)
    to_x = np.empty_like(gate)

    def work(
        to_gate: np.ndarray, to_x: np.ndarray, gate: np.ndarray, x: np.ndarray, slope: np.ndarray
    ) -> None:
        share = sigmoid(gate)
        silu = gate * share
        np.multiply(silu, slope, out=to_x)
        np.multiply((silu + share * (1 - silu)) * x, slope, out=to_gate)

    in_chunks(work, to_gate, to_x, gate, x, slope)
    return mx.array(to_gate.reshape(grad.shape)), mx.array(to_x.reshape(grad.shape))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Of float32 numbers."""
    out = np.negative(x)
    np.minimum(out, LARGEST, out=out)
    np.exp(out, out=out)
    out += 1
    return np.reciprocal(out, out=out)


def _rows(x: mx.array) -> np.ndarray:
    """The array as rows (n, last axis)."""
    return np.asarray(x).reshape(-1, x.shape[-1])


def in_chunks(work: Callable[..., None], *arrays: np.ndarray) -> None:
    """Work on arrays with as many rows as each other, a few rows at a time, in parallel."""
    step = max(1, CHUNK // max(array.shape[-1] for array in arrays))

    def work_at(start: int) -> None:
        work(*(array[start : start + step] for array in arrays))

    starts = range(0, len(arrays[0]), step)
    if len(starts) == 1:
        work_at(0)
    else:
        list(_pool().map(work_at, starts))


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _query_ranges(q: mx.array) -> Iterator[tuple[int, int]]:
    length = q.shape[-2]
    for start in range(0, length, QUERIES):
        yield start, min(start + QUERIES, length)


def _grouped(q: mx.array, k: mx.array) -> mx.array:
    """(batch, heads, n, size) as (batch, heads of k, heads that share one, n, size)."""
    return q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])


def _flat(grouped: mx.array, start: int, stop: int) -> mx.array:
    """Some queries of all heads that share their keys and values: one tall matrix of each group."""
    return grouped[..., start:stop, :].reshape(*grouped.shape[:2], -1, grouped.shape[-1])


def _added(total: mx.array | None, first: mx.array) -> mx.array:
    """The sum of gradients at keys (batch, heads, n, size), of which one has only the first n."""
    if total is None:
        return first
    stop = first.shape[-2]
    return mx.concatenate([total[..., :stop, :] + first, total[..., stop:, :]], axis=-2)


def _shares(grouped: mx.array, k: mx.array, start: int, stop: int) -> mx.array:
    """Softmax of the scores (batch, heads of k, queries of a group, keys up to `stop`)."""
    scores = _flat(grouped, start, stop) @ k[..., :stop, :].swapaxes(-1, -2)
    mx.eval(scores)
    future = np.triu(np.full((stop - start,) * 2, -np.inf, dtype=np.float32), 1)

    def work(rows: np.ndarray) -> None:
        rows[..., start:] += future
        rows -= rows.max(axis=-1, keepdims=True)
        np.exp(rows, out=rows)
        rows /= rows.sum(axis=-1, keepdims=True)

    # In place: nothing else holds the scores.
    values = np.asarray(scores).reshape(-1, stop - start, stop)
    list(_pool().map(work, np.array_split(values, 2 * (os.cpu_count() or 1))))
    return scores
