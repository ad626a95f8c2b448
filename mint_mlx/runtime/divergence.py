"""Kullback-Leibler divergences of next-token distributions, in nats: all that are computed.

KL(p || q) has p from the source and q from the model that is compared or trained. On a CPU all use
numpy's exponential, which is faster there. Of p's
tokens only the K most likely may be known: then all others count as one token, which lowers the
divergence a little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx
import numpy as np

from . import fast_math
from .device import on_cpu
from .fast_math import in_chunks, logsumexp

SCORED_REST = 1e-9  # least mass that all other tokens have in a score
TRAINED_REST = 1e-6  # the same in training, where the gradient is one over it


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities over the last axis, float32."""
    return logits - logsumexp(logits)


def kl(logp: mx.array, logq: mx.array, exp: Callable[[mx.array], mx.array] = mx.exp) -> mx.array:
    """The sum of p log(p/q) over the last axis; `exp` without a gradient is enough for a score."""
    return mx.sum(exp(logp) * (logp - logq), axis=-1)


def rest_mass(logp: mx.array) -> mx.array:
    """Log of the mass that K tokens (n, K) leave to all others.

    Scores use it on both sides, so that equal models have a divergence of exactly zero.
    """
    return mx.log(mx.maximum(1 - mx.sum(fast_math.exp(logp), axis=-1), SCORED_REST))


def scored_kl(logp: mx.array, logq: mx.array, rest: mx.array | None = None) -> mx.array:
    """The divergence at each position (n,), for a score.

    Args:
        logp, logq: (n, K) of the same tokens.
        rest: (n,), log of p's mass on all other tokens; None where there are no others.
    """
    divergence = kl(logp, logq, fast_math.exp)
    if rest is None:
        return divergence
    return divergence + fast_math.exp(rest) * (rest - rest_mass(logq))


def mean_kl(logits: mx.array, target: mx.array) -> mx.array:
    """The mean over tokens of KL(target || model), with a gradient at `logits`.

    Both are logits, float32 (windows, tokens, vocabulary).
    """
    logp = log_softmax(target)
    if on_cpu():
        return _written_out(logits, logp, None)
    return mx.mean(kl(logp, log_softmax(logits)))


def mean_merged_kl(logits: mx.array, ids: mx.array, logp: mx.array, counted: mx.array) -> mx.array:
    """The mean over tokens of KL(source || model) over the source's K best, with a gradient.

    Args:
        logits: float32 (windows, tokens, vocabulary) of the model.
        ids, logp: (windows, tokens, K) of the source.
        counted: bool (windows, tokens), which tokens count.
    """
    if on_cpu():
        return _written_out(logits, logp, ids, counted)
    logq = mx.take_along_axis(logits, ids, axis=-1) - logsumexp(logits)
    p, q = mx.exp(logp), mx.exp(logq)
    rest_p, rest_q = (mx.maximum(1 - mx.sum(x, axis=-1), TRAINED_REST) for x in (p, q))
    best = mx.sum(p * (logp - logq), axis=-1)
    each = best + rest_p * (mx.log(rest_p) - mx.log(rest_q))
    return mx.sum(mx.where(counted, each, 0)) / mx.sum(counted)


def _written_out(
    logits: mx.array, logp: mx.array, ids: mx.array | None, counted: mx.array | None = None
) -> mx.array:
    """Both of these in numpy, where the gradient takes the same exponentials.

    Args:
        logits: float32 (..., vocabulary) of the model.
        logp: float32 (..., K) of the source.
        ids: int (..., K), its K best; None for the whole vocabulary.
        counted: bool (...), which rows count; all by default.
    """
    known = [array for array in (logp, ids) if array is not None]

    @mx.custom_function
    def divergence(logits: mx.array) -> tuple[mx.array, mx.array]:
        rows = [np.asarray(array).reshape(-1, array.shape[-1]) for array in (logits, *known)]
        values = np.empty((len(rows[0]), 1), dtype=np.float32)
        slopes = np.empty_like(rows[0])
        in_chunks(_merged if ids is not None else _whole, values, slopes, *rows)
        share = np.float32(1 / len(slopes))
        if counted is not None:
            counts = np.asarray(counted).reshape(-1, 1)
            share = counts / np.float32(counts.sum())
        slopes *= share
        return mx.array((values * share).sum()), mx.array(slopes.reshape(logits.shape))

    @divergence.vjp
    def _(
        _: mx.array, grads: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
    ) -> mx.array:
        return grads[0] * outputs[1]

    value, _ = cast(tuple[mx.array, mx.array], divergence(logits))
    return value


def _whole(value: np.ndarray, slope: np.ndarray, logits: np.ndarray, logp: np.ndarray) -> None:
    """The divergence of each row and its gradient over a whole vocabulary.

    Args:
        value: float32 (n, 1), is set.
        slope: float32 (n, vocabulary), is set to the gradient at `logits`.
        logits, logp: float32 (n, vocabulary).
    """
    total = _softmax(logits, slope)
    p = np.exp(logp)
    value[:] = np.sum(p * (logp - logits + total), axis=-1, keepdims=True)
    slope -= p


def _merged(
    value: np.ndarray, slope: np.ndarray, logits: np.ndarray, logp: np.ndarray, ids: np.ndarray
) -> None:
    """As `_whole`, from the K best tokens `ids` (n, K), which `logp` is of."""
    total = _softmax(logits, slope)
    first = np.arange(0, logits.size, logits.shape[-1])[:, None]  # of each row
    places = ids + first
    p = np.exp(logp)
    q = slope.reshape(-1).take(places)
    logq = logits.reshape(-1).take(places) - total
    rest_p = np.maximum(1 - p.sum(axis=-1, keepdims=True), TRAINED_REST)
    open_q = 1 - q.sum(axis=-1, keepdims=True)
    rest_q = np.maximum(open_q, TRAINED_REST)
    best = np.sum(p * (logp - logq), axis=-1, keepdims=True)
    value[:] = best + rest_p * (np.log(rest_p) - np.log(rest_q))

    # First at the log-probabilities of the best, then at the logits that these are made of.
    to_logq = np.where(open_q > TRAINED_REST, rest_p / rest_q, np.float32(0)) * q - p
    to_total = -to_logq.sum(axis=-1, keepdims=True)
    slope *= to_total
    slope.reshape(-1)[places] = q * to_total + to_logq


def _softmax(logits: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Softmax over the last axis into `out`; the log of the sum of exp, (n, 1), is returned."""
    largest = logits.max(axis=-1, keepdims=True)
    np.exp(np.subtract(logits, largest, out=out), out=out)
    total = out.sum(axis=-1, keepdims=True)
    out /= total
    return largest + np.log(total)
