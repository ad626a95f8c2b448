"""Attention, SwiGLU and log-sum-exp with numpy's exponential, and their gradients, for MLX's CPU
backend on Linux.

MLX's own is not vectorised there (80 M/s; numpy's is ten times faster), which makes it the cost of
attention and of every score, and a third of that of a step of learning. On a GPU all of this is
MLX's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu as stock_swiglu

from .cpu_ops import on_cpu

QUERIES = 192  # of attention at once
PART = 1 << 17  # numbers that a thread works on at once, so that they stay in its cache
MOST = 80.0  # float32's exp is finite there


@contextmanager
def fast_math(model: nn.Module) -> Iterator[None]:
    """Compute a model's causal attention and SwiGLU this way, for a moment."""
    if not on_cpu():
        yield
        return
    stock = mx.fast.scaled_dot_product_attention

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **more: Any
    ) -> mx.array:
        plain = (
            isinstance(mask, str)
            and mask == "causal"
            and not any(value is not None for value in more.values())
        )
        if not plain or q.shape[-2] != k.shape[-2] or q.dtype != mx.float32:
            return stock(q, k, v, scale=scale, mask=mask, **more)
        return causal_attention(q, k, v, scale)

    modules = {sys.modules[type(m).__module__] for m in model.modules()}
    users = [module for module in modules if getattr(module, "swiglu", None) is stock_swiglu]
    mx.fast.scaled_dot_product_attention = attention
    for module in users:
        module.swiglu = swiglu  # type: ignore[attr-defined]
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = stock
        for module in users:
            module.swiglu = stock_swiglu  # type: ignore[attr-defined]


def exp(x: mx.array) -> mx.array:
    """exp of a float32 array."""
    return mx.array(np.exp(np.asarray(x))) if on_cpu() else mx.exp(x)


def logsumexp(x: mx.array) -> mx.array:
    """log of the sum of exp over the last axis of a float32 array, the axis kept."""
    if not on_cpu():
        return mx.logsumexp(x, axis=-1, keepdims=True)
    found = _logsumexp(x)
    assert isinstance(found, mx.array)
    return found


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, arrays of one shape."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32 or gate.shape != x.shape:
        return stock_swiglu(gate, x)
    found = _swiglu(gate, x)
    assert isinstance(found, mx.array)
    return found


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, float32: q (batch, heads, n, size), k and v with as many heads or a divisor
    of them.
    """

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        rows = _grouped(q * scale, k)
        parts = [_shares(rows, k, *some) @ v[..., : some[1], :] for some in _some_queries(q)]
        return mx.concatenate(
            [part.reshape(*q.shape[:2], -1, v.shape[-1]) for part in parts], axis=-2
        )

    @attention.vjp
    def _(primals: Any, grad: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = primals
        rows, back = _grouped(q * scale, k), _grouped(grad, k)
        to_q, to_k, to_v = [], mx.zeros_like(k), mx.zeros_like(v)
        for start, stop in _some_queries(q):
            share = _shares(rows, k, start, stop)
            arrived = _flat(back, start, stop)
            error = arrived @ v[..., :stop, :].swapaxes(-1, -2)
            error = share * (error - mx.sum(error * share, axis=-1, keepdims=True))
            to_q.append((error @ k[..., :stop, :] * scale).reshape(*q.shape[:2], stop - start, -1))
            to_k[..., :stop, :] += error.swapaxes(-1, -2) @ _flat(rows, start, stop)
            to_v[..., :stop, :] += share.swapaxes(-1, -2) @ arrived
        return mx.concatenate(to_q, axis=-2), to_k, to_v

    found = attention(q, k, v)
    assert isinstance(found, mx.array)
    return found


@mx.custom_function
def _logsumexp(x: mx.array) -> mx.array:
    values = _rows(x)
    out = np.empty((len(values), 1), dtype=np.float32)

    def work(out: np.ndarray, x: np.ndarray) -> None:
        most = x.max(axis=-1, keepdims=True)
        np.log(np.exp(x - most).sum(axis=-1, keepdims=True), out=out)
        out += most

    _in_parts(work, out, values)
    return mx.array(out.reshape(*x.shape[:-1], 1))


@_logsumexp.vjp
def _(x: mx.array, grad: mx.array, found: mx.array) -> mx.array:
    values, slope, total = (_rows(array) for array in (x, grad, found))
    out = np.empty_like(values)

    def work(out: np.ndarray, x: np.ndarray, slope: np.ndarray, total: np.ndarray) -> None:
        np.exp(np.subtract(x, total, out=out), out=out)
        out *= slope

    _in_parts(work, out, values, slope, total)
    return mx.array(out.reshape(x.shape))


@mx.custom_function
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    values, times = _rows(gate), _rows(x)
    out = np.empty_like(values)

    def work(out: np.ndarray, gate: np.ndarray, x: np.ndarray) -> None:
        np.multiply(gate * _sigmoid(gate), x, out=out)

    _in_parts(work, out, values, times)
    return mx.array(out.reshape(gate.shape))


@_swiglu.vjp
def _(primals: Any, grad: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, x, slope = (_rows(array) for array in (*primals, grad))
    to_gate, to_x = np.empty_like(gate), np.empty_like(gate)

    def work(
        to_gate: np.ndarray, to_x: np.ndarray, gate: np.ndarray, x: np.ndarray, slope: np.ndarray
    ) -> None:
        open_ = _sigmoid(gate)
        silu = gate * open_
        np.multiply(silu, slope, out=to_x)
        np.multiply((silu + open_ * (1 - silu)) * x, slope, out=to_gate)

    _in_parts(work, to_gate, to_x, gate, x, slope)
    return mx.array(to_gate.reshape(grad.shape)), mx.array(to_x.reshape(grad.shape))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    out = np.negative(x)
    np.minimum(out, MOST, out=out)
    np.exp(out, out=out)
    out += 1
    return np.reciprocal(out, out=out)


def _rows(x: mx.array) -> np.ndarray:
    """The array as rows (n, last axis)."""
    return np.asarray(x).reshape(-1, x.shape[-1])


def _in_parts(work: Callable[..., None], *arrays: np.ndarray) -> None:
    """Work on arrays of as many rows, a few rows of each at a time, in parallel."""
    step = max(1, PART // max(array.shape[-1] for array in arrays))
    list(
        _pool().map(
            lambda i: work(*(array[i : i + step] for array in arrays)),
            range(0, len(arrays[0]), step),
        )
    )


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _some_queries(q: mx.array) -> Iterator[tuple[int, int]]:
    length = q.shape[-2]
    for start in range(0, length, QUERIES):
        yield start, min(start + QUERIES, length)


def _grouped(q: mx.array, k: mx.array) -> mx.array:
    """(batch, heads, n, size) as (batch, heads of k, heads that share one, n, size)."""
    return q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])


def _flat(grouped: mx.array, start: int, stop: int) -> mx.array:
    """Some queries of all heads that share their keys and values: one tall matrix of each group."""
    return grouped[..., start:stop, :].reshape(*grouped.shape[:2], -1, grouped.shape[-1])


def _shares(rows: mx.array, k: mx.array, start: int, stop: int) -> mx.array:
    """Softmax of the scores (batch, heads of k, queries of a group, keys up to `stop`)."""
    scores = _flat(rows, start, stop) @ k[..., :stop, :].swapaxes(-1, -2)
    mx.eval(scores)
    hidden = np.triu(np.full((stop - start,) * 2, -np.inf, dtype=np.float32), 1)

    def work(part: np.ndarray) -> None:
        part[..., start:] += hidden
        part -= part.max(axis=-1, keepdims=True)
        np.exp(part, out=part)
        part /= part.sum(axis=-1, keepdims=True)

    values = np.asarray(scores).reshape(
        -1, stop - start, stop
    )  # in place: nobody else holds the scores
    list(_pool().map(work, np.array_split(values, 2 * (os.cpu_count() or 1))))
    return scores
