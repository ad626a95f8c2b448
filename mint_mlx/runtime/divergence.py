"""Kullback-Leibler divergences of next-token distributions, in nats: all that are computed.

KL(p || q) has p from the source and q from the model that is compared or trained. Scores use
numpy's exponential, which is faster on a CPU; training needs a gradient and uses MLX's. Of p's
tokens only the K most likely may be known: then all others count as one token, which lowers the
divergence a little.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from . import fast_math
from .fast_math import logsumexp

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
    """The mean over tokens of KL(target || model), with a gradient.

    Both are logits, float32 (windows, tokens, vocabulary).
    """
    return mx.mean(kl(log_softmax(target), log_softmax(logits)))


def mean_merged_kl(logits: mx.array, ids: mx.array, logp: mx.array) -> mx.array:
    """The mean over tokens of KL(source || model) over the source's K best, with a gradient.

    Args:
        logits: float32 (windows, tokens, vocabulary) of the model.
        ids, logp: (windows, tokens, K) of the source.
    """
    logq = mx.take_along_axis(logits, ids, axis=-1) - logsumexp(logits)
    p, q = mx.exp(logp), mx.exp(logq)
    rest_p, rest_q = (mx.maximum(1 - mx.sum(x, axis=-1), TRAINED_REST) for x in (p, q))
    best = mx.sum(p * (logp - logq), axis=-1)
    return mx.mean(best + rest_p * (mx.log(rest_p) - mx.log(rest_q)))
