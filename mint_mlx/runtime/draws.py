"""Tokens drawn from a model's predictions, and the loss of such tokens.

A draw is the first token at which the sum of the probabilities reaches a uniform random number, so
that one number of each window and position decides, however many are drawn at once. On a CPU numpy
does it, whose exponential is ten times as fast as MLX's there.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import numpy as np

from .device import on_cpu

RUN = 256  # probabilities that are added up in one go


def uniform_numbers(what: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 numbers from 0 to 1; the same seed gives the same.

    Args:
        what: they decide. Numbers of another thing are independent: labels that were drawn by the
            numbers of the text itself would follow from it.
        seed, shape: of the numbers.
    """
    return np.random.default_rng([seed, *what.encode()]).random(shape)


def draw(logits: mx.array, uniform: np.ndarray) -> np.ndarray:
    """One token of each prediction.

    Args:
        logits: float32 (..., vocabulary).
        uniform: float64 (...), from 0 to 1.

    Returns:
        int32 (...).
    """
    if not on_cpu():
        sums = mx.cumsum(mx.softmax(logits, axis=-1), axis=-1)
        reached = mx.array(uniform.astype(np.float32))[..., None] * sums[..., -1:]
        labels = mx.sum(sums < reached, axis=-1)
        return np.asarray(mx.minimum(labels, logits.shape[-1] - 1)).astype(np.int32)
    likelihoods, _ = _likelihoods(np.asarray(logits))
    return _labels(likelihoods, uniform)


def drawn_loss(logits: mx.array, uniform: np.ndarray) -> mx.array:
    """The negative log-likelihood, summed, of tokens drawn from the predictions themselves.

    Args:
        logits: float32 (..., vocabulary).
        uniform: float64 (...), from 0 to 1.

    Returns:
        A number, whose gradient at the logits is that of the loss.
    """
    if not on_cpu():
        labels = mx.array(draw(mx.stop_gradient(logits), uniform))
        chosen = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return mx.sum(mx.logsumexp(logits, axis=-1) - chosen)

    @mx.custom_function
    def loss(logits: mx.array) -> mx.array:
        values = np.asarray(logits)
        likelihoods, total = _likelihoods(values)
        labels = _labels(likelihoods, uniform)[..., None]
        surprise = np.log(total[..., 0]) + values.max(-1)
        surprise -= np.take_along_axis(values, labels, -1)[..., 0]

        # The gradient, shares less what was drawn, takes the place of the likelihoods.
        likelihoods /= total
        np.put_along_axis(likelihoods, labels, np.take_along_axis(likelihoods, labels, -1) - 1, -1)
        gradients.append(mx.array(likelihoods))
        return mx.array(surprise.sum(dtype=np.float64), dtype=mx.float32)

    @loss.vjp
    def _(logits: mx.array, grad: mx.array, _: mx.array) -> mx.array:
        return gradients.pop() * grad

    gradients: list[mx.array] = []
    return cast(mx.array, loss(logits))


def _likelihoods(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp of the logits less their largest, and its sums over the last axis, which stays."""
    values = logits - logits.max(axis=-1, keepdims=True)
    np.exp(values, out=values)
    return values, values.sum(axis=-1, keepdims=True)


def _labels(likelihoods: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The token at which the sum of likelihoods reaches its share `uniform` of the whole.

    First the run of tokens is looked for, then the token in it.

    Args:
        likelihoods: float32 (..., vocabulary).
        uniform: float64 (...).
    """
    vocabulary = likelihoods.shape[-1]
    rows = likelihoods.reshape(-1, vocabulary)
    starts = np.arange(0, vocabulary, RUN)
    sums = np.add.reduceat(rows, starts, axis=1).astype(np.float64).cumsum(axis=1)
    wanted = uniform.reshape(-1) * sums[:, -1]
    labels = np.empty(len(rows), dtype=np.int32)
    for index, (row, sum_of_runs, want) in enumerate(zip(rows, sums, wanted, strict=True)):
        run = min(int(np.searchsorted(sum_of_runs, want)), len(starts) - 1)
        before = sum_of_runs[run - 1] if run else 0.0
        inside = row[run * RUN : (run + 1) * RUN].cumsum(dtype=np.float64)
        offset = min(int(np.searchsorted(inside, want - before)), len(inside) - 1)
        labels[index] = run * RUN + offset
    return labels.reshape(uniform.shape)
