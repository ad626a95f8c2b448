"""Arrays in memory: whether they are finite, their bytes, a layer's dense weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.errors import TOO_LARGE, MintError
from ..base.quant_config import NVFP4_LARGEST, QuantConfig
from .layers import MLX_DTYPES, Layer

# numpy's types for safetensors codes; it has no bfloat16, whose bits are read as integers.
FLOATS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
# The bits of infinity without a sign; those of NaN are larger.
INFINITY = {mx.bfloat16: 0x7F80, mx.float16: 0x7C00, mx.float32: 0x7F800000}
CHUNK = 1 << 16  # numbers checked at once: small enough for the CPU's cache


def all_finite(array: mx.array) -> bool:
    """Whether an evaluated array holds neither NaN nor infinity.

    Only these have every bit of the exponent set. numpy compares the bits four times as fast as
    MLX does on a CPU.
    """
    if not mx.issubdtype(array.dtype, mx.floating) or not array.size:
        return True
    bits = flat_view(array, np.uint16 if array.itemsize == 2 else np.uint32)
    return bits_finite(bits, INFINITY[array.dtype])


def bits_finite(bits: np.ndarray, infinity: int) -> bool:
    """Whether flat numbers, given as their bits, are all below infinity without their signs."""
    without_sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    chunks = (bits[i : i + CHUNK] for i in range(0, bits.size, CHUNK))
    return all(int((chunk & without_sign).max()) < infinity for chunk in chunks)


def has_nan_codes(tensors: Mapping[str, mx.array], config: QuantConfig) -> bool:
    """Whether a layer's codes or scales have bytes that stand for NaN, in the modes that have such.

    Args:
        tensors: `weight` and `scales`.
        config: how they are quantized.
    """
    if config.mode == "affine":
        return False
    scales = tensors["scales"]
    nan = (scales & 0x7F) == 0x7F if config.mode == "nvfp4" else scales == 0xFF
    if config.mode == "mxfp8":
        codes = tensors["weight"].view(mx.uint8)
        return bool(mx.any(nan)) or bool(mx.any((codes & 0x7F) == 0x7F))
    return bool(mx.any(nan))


def cast(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """An array in another type; `name` is for the message.

    Raises:
        MintError: it is finite, but float16 cannot hold it.
    """
    if array.dtype == dtype:
        return array
    result = array.astype(dtype)
    if dtype == mx.float16 and array.size and mx.any(mx.isinf(result) & mx.isfinite(array)):
        raise MintError(f"{name} {TOO_LARGE}")
    return result


def flat_view(array: mx.array, dtype: type[np.unsignedinteger[Any]]) -> np.ndarray:
    """An array's memory as flat numbers of another type (numpy has no bfloat16).

    MLX itself cannot flatten an array of 2^31 numbers or more, as DeepSeek-V3's expert layers are,
    and would view it in a thread of its own, for which this one waits.
    """
    if not array.size:
        return np.empty(0, dtype=dtype)
    memory = memoryview(array)  # type: ignore[arg-type]
    if not memory.c_contiguous:
        memory = memoryview(mx.contiguous(array))  # type: ignore[arg-type]
    return np.frombuffer(memory, dtype=dtype)


def dense(layer: Layer, tensors: dict[str, mx.array]) -> mx.array:
    """A layer's unquantized weight, in the type that it (or its scales) will be written in.

    A layer that is quantized in the source is restored as code x scale + bias in float32, rounded
    once; expert by expert, so that no float32 copy of the whole layer exists.

    Raises:
        MintError: it is finite, but float16 cannot hold it.
    """
    if layer.stored is None:
        return tensors["weight"]
    config = layer.stored
    dtype: mx.Dtype = getattr(mx, MLX_DTYPES[layer.dtype])
    weight, scales, biases = tensors["weight"], tensors["scales"], tensors.get("biases")

    def restore(experts: slice) -> mx.array:
        bias = None if biases is None else biases[experts].astype(mx.float32)
        scale = scales[experts]
        if config.mode == "affine":
            scale = scale.astype(mx.float32)
        exact = mx.dequantize(
            weight[experts],
            scale,
            bias,
            config.group_size,
            config.bits,
            config.mode,
            dtype=mx.float32,
        )
        if config.global_scale:
            exact = exact * (tensors["global_scale"][experts] / NVFP4_LARGEST)[:, None, None]
        return cast(f"{layer.path}.weight", exact, dtype)

    if weight.ndim < 3:
        return restore(slice(None))

    # Each expert is evaluated before the next one is begun, which bounds the memory.
    restored = []
    for expert in range(weight.shape[0]):
        restored.append(restore(slice(expert, expert + 1)))
        mx.eval(restored[-1])
    return mx.concatenate(restored)
