"""Random weights in MLX's packing, made as fast as memory is written, to time products with."""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import numpy as np

from ..base.quant_config import QuantConfig

_POOL = 1 << 20  # random numbers that all others repeat
# Root mean square of random codes at a scale of one: uniform integers; e2m1; e4m3 below 2.
_E2M1 = 2.9
_E4M3 = 0.8


def random_dense(shape: tuple[int, ...], spread: float, dtype: mx.Dtype) -> mx.array:
    """Normal numbers with this standard deviation."""
    noise = _noise()[: min(math.prod(shape), _POOL)] * spread
    return _repeated(noise.astype(dtype), shape)


def random_codes(
    lead: tuple[int, ...], columns: int, config: QuantConfig, spread: float, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """A quantized weight whose values have about this root mean square and no mean.

    Args:
        lead: its shape without the columns.
        columns: of the unquantized weight.
        config: its configuration.
        spread: root mean square.
        dtype: of affine scales and biases.

    Returns:
        `weight`, `scales` and, where affine, `biases`, as `mx.quantize` packs them.
    """
    pool = _bits()
    if config.mode == "mxfp8":
        pool = pool & 0xBFBFBFBF  # small exponents: no code is NaN
    codes = _repeated(pool, (*lead, columns * config.bits // 32))
    groups = (*lead, columns // config.group_size)
    if config.mode == "affine":
        steps = 2**config.bits - 1
        scale = spread * math.sqrt(12) / steps
        return {
            "weight": codes,
            "scales": mx.full(groups, scale, dtype),
            "biases": mx.full(groups, -scale * steps / 2, dtype),
        }

    # Scales are bytes: exponents of two, or e4m3, whose numbers below 2^-6 are steps of 2^-9.
    scale = spread / (_E4M3 if config.mode == "mxfp8" else _E2M1)
    power = round(math.log2(scale))
    code = power + 127
    if config.mode == "nvfp4":
        code = (power + 7) << 3 if power >= -6 else max(1, round(scale * 512))
    return {"weight": codes, "scales": mx.full(groups, code, mx.uint8)}


@cache
def _bits() -> mx.array:
    """Random words of 32 bits."""
    return mx.array(np.random.default_rng(0).integers(0, 1 << 32, _POOL, dtype=np.uint32))


@cache
def _noise() -> mx.array:
    """Normal numbers of unit variance."""
    return mx.array(np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32))


def _repeated(pool: mx.array, shape: tuple[int, ...]) -> mx.array:
    """An array of a pool's numbers over and over."""
    size = math.prod(shape)
    return mx.contiguous(mx.tile(pool, -(-size // pool.size))[:size].reshape(shape))
