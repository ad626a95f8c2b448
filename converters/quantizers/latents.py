"""Adam's step on latent codes, and the weights that they stand for (learn_block.py).

Every latent code takes part in each step, also those of experts that few tokens reached, so that of
a large block this is most of the work. On a CPU numpy does it a few groups at a time, which stay in
the processor's cache from one operation to the next; on a GPU MLX makes one kernel of it for each
shape of a layer.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ...runtime.device import on_cpu
from ...runtime.fast_math import in_chunks

BETAS = 0.9, 0.999  # Adam's (Kingma and Ba, 2015)
EPSILON = 1e-8


def take_step(
    latent: mx.array,
    moments: tuple[mx.array, mx.array],
    to_weight: mx.array,
    scales: mx.array,
    bits: int,
    rate: float,
    step: int,
) -> tuple[mx.array, tuple[mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Move a layer's latent codes by Adam; the gradient passes their rounding.

    Args:
        latent: float32 (..., columns). On a CPU it and the moments are changed in place.
        moments: the means of the gradient and of its square, float32 of the same shape.
        to_weight: the gradient at the weight that they stand for.
        scales: float32 (..., groups) of this moment.
        bits: of a code.
        rate: Adam's in this step.
        step: its number, from one.

    Returns:
        The new latent codes and moments; and the gradients at scales and biases, float32 (...,
        groups).
    """
    rates = [rate / (1 - BETAS[0] ** step), (1 - BETAS[1] ** step) ** -0.5]
    top = 2**bits - 1
    if not on_cpu():
        # Numbers as arrays: others would be compiled anew in each step.
        numbers = mx.array([top, *rates], dtype=mx.float32)
        slope = to_weight.astype(mx.float32)
        new, mean, square, *sums = _compiled_step(latent, *moments, slope, scales, numbers)
        return new, (mean, square), (sums[0], sums[1])

    to_scales, to_biases = np.empty((2, scales.size, 1), dtype=np.float32)
    size = latent.size // scales.size
    arrays = [np.asarray(a).reshape(-1, size) for a in (latent, *moments)]
    slopes = np.asarray(to_weight.astype(mx.float32)).reshape(-1, size)

    def work(*some: np.ndarray) -> None:
        _step(some, top, *rates)

    in_chunks(work, *arrays, slopes, np.asarray(scales).reshape(-1, 1), to_scales, to_biases)
    sums = [mx.array(array.reshape(scales.shape)) for array in (to_scales, to_biases)]
    return latent, moments, (sums[0], sums[1])


def dense(
    latent: mx.array, scales: mx.array, biases: mx.array, bits: int, dtype: mx.Dtype
) -> mx.array:
    """The weight (..., columns) that latent codes stand for.

    Args:
        latent: float32 (..., columns).
        scales, biases: float32 (..., groups).
        bits: of a code.
        dtype: of the weight.
    """
    top = 2**bits - 1
    if not on_cpu():
        return _compiled_dense(latent, scales, biases, mx.array(top)).astype(dtype)

    size = latent.size // scales.size
    by_group = [np.asarray(a).reshape(-1, 1) for a in (scales, biases)]
    out = np.empty((scales.size, size), dtype=np.float32)

    def work(out: np.ndarray, latent: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> None:
        _round(latent, top, out)
        out *= scale
        out += bias

    in_chunks(work, out, np.asarray(latent).reshape(-1, size), *by_group)
    return mx.array(out.reshape(latent.shape)).astype(dtype)


def _step(arrays: tuple[np.ndarray, ...], top: int, rate: float, correction: float) -> None:
    """`take_step` of some groups, in place.

    Args:
        arrays: latents, both moments and the gradient at the weight, float32 (groups, columns of a
            group); scales, and where the gradients at scales and biases go, (groups, 1).
        top: the highest code.
        rate: Adam's, corrected for the first moment's start at zero.
        correction: of the root of the second.
    """
    latent, mean, square, slope, scale, to_scale, to_bias = arrays
    work = np.empty_like(latent)
    _round(latent, top, work)
    np.einsum("gc,gc->g", slope, work, out=to_scale[:, 0])
    np.matmul(slope, np.ones(slope.shape[1], dtype=np.float32), out=to_bias[:, 0])

    to_latent = slope * scale
    mean *= np.float32(BETAS[0])
    mean += np.multiply(to_latent, np.float32(1 - BETAS[0]), out=work)
    square *= np.float32(BETAS[1])
    np.square(to_latent, out=work)
    work *= np.float32(1 - BETAS[1])
    square += work

    np.sqrt(square, out=work)
    work *= np.float32(correction)
    work += np.float32(EPSILON)
    np.divide(mean, work, out=work)
    work *= np.float32(rate)
    latent -= work
    # One that left the grid can come back at once.
    np.clip(latent, np.float32(-0.5), np.float32(top + 0.5), out=latent)


def _round(latent: np.ndarray, top: int, out: np.ndarray) -> None:
    """The codes of latents."""
    np.rint(latent, out=out)
    np.clip(out, np.float32(0), np.float32(top), out=out)


def _step_of_arrays(
    latent: mx.array,
    mean: mx.array,
    square: mx.array,
    to_weight: mx.array,
    scales: mx.array,
    numbers: mx.array,
) -> tuple[mx.array, ...]:
    """As `_step`; `numbers` are the highest code, the rate and the correction."""
    top, rate, correction = numbers
    by_group = *scales.shape, -1
    slope = to_weight.reshape(by_group)
    codes = mx.clip(mx.round(latent), 0, top).reshape(by_group)
    to_latent = (slope * scales[..., None]).reshape(latent.shape)

    mean = BETAS[0] * mean + (1 - BETAS[0]) * to_latent
    square = BETAS[1] * square + (1 - BETAS[1]) * mx.square(to_latent)
    moved = latent - rate * mean / (mx.sqrt(square) * correction + EPSILON)
    sums = mx.sum(slope * codes, axis=-1), mx.sum(slope, axis=-1)
    return mx.clip(moved, -0.5, top + 0.5), mean, square, *sums


def _dense_of_arrays(
    latent: mx.array, scales: mx.array, biases: mx.array, top: mx.array
) -> mx.array:
    """As `dense`."""
    codes = mx.clip(mx.round(latent), 0, top).reshape(*scales.shape, -1)
    return (codes * scales[..., None] + biases[..., None]).reshape(latent.shape)


_compiled_step = mx.compile(_step_of_arrays)
_compiled_dense = mx.compile(_dense_of_arrays)
