"""Random weights in MLX's packing, made as fast as memory is written, to time products with."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np

from ..base.quant_config import QuantConfig

_POOL = 1 << 20  # random numbers that all others repeat
_LEAST = 128_000_000  # bytes of an array that weights are parts of
# Root mean square of random codes at a scale of one: uniform integers; e2m1; e4m3 below 2.
_E2M1 = 2.9
_E4M3 = 0.8


Pool = dict[tuple[object, ...], mx.array]  # arrays, by what they hold


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


def random_part(pool: Pool, dtype: mx.Dtype, shape: tuple[int, ...], copy: int) -> mx.array:
    """Random words (uint32), or normal numbers whose squares' mean is 1e-6.

    Args:
        pool: is given the array that this is a part of, where it has none that is long enough.
        dtype: of the numbers.
        shape: of the part.
        copy: parts of other copies lie elsewhere, as far as there is room.
    """

    def make(size: int) -> mx.array:
        if dtype != mx.uint32:
            return random_dense((size,), 1e-3, dtype)
        return _repeated(_bits() & 0xBFBFBFBF, (size,))  # in mxfp8 no code is NaN

    return _part(pool, (dtype,), make, shape, copy, _LEAST // dtype.size)


def constant_part(
    pool: Pool, value: float, dtype: mx.Dtype, shape: tuple[int, ...], copy: int
) -> mx.array:
    """The same number everywhere; else as `random_part`, for scales: eight times shorter."""
    size = _LEAST // 8 // dtype.size
    return _part(pool, (value, dtype), lambda n: mx.full((n,), value, dtype), shape, copy, size)


def _part(
    pool: Pool,
    key: tuple[object, ...],
    make: Callable[[int], mx.array],
    shape: tuple[int, ...],
    copy: int,
    least: int,
) -> mx.array:
    """A part of the pool's array, which is made anew where it is too short."""
    size = math.prod(shape)
    if key not in pool or pool[key].size < size:
        pool[key] = make(max(size, least))
        mx.eval(pool[key])
    start = copy % (pool[key].size // size) * size
    return pool[key][start : start + size].reshape(shape)


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
