"""Reads FP8 sources: E4M3 weights with float32 scales.

A scale belongs to a block of 128x128 weights (DeepSeek-V3, MiniMax-M2, Qwen3-FP8) or to a whole
tensor (Ministral). A few of mlx-lm's model classes dequantize these in their `sanitize`; this file
does the same for all others.
"""

from __future__ import annotations

import mlx.core as mx

SCALE = "_scale_inv"  # ends the name of a weight's scales
BLOCK = 128  # rows and columns that share a scale


def dequantize(weight: mx.array, scale_inv: mx.array) -> mx.array:
    """A weight from its codes: E4M3(code) x scale of its block, rounded once to bfloat16.

    Args:
        weight: uint8 (..., rows, columns), E4M3 codes.
        scale_inv: float32 (..., ceil(rows / 128), ceil(columns / 128)), or one number for the whole
            tensor.

    Returns:
        bfloat16 (..., rows, columns).
    """
    scales = scale_inv
    if scale_inv.size > 1:
        rows, columns = weight.shape[-2:]
        scales = mx.repeat(mx.repeat(scale_inv, BLOCK, axis=-2), BLOCK, axis=-1)
        scales = scales[..., :rows, :columns]  # the last blocks may be cut off
    exact = mx.from_fp8(weight, dtype=mx.float32) * scales.astype(mx.float32)
    return exact.astype(mx.bfloat16)


def dequantize_all(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """A checkpoint's tensors with every FP8 weight dequantized (lazily) and without scales."""
    scales = {name.removesuffix(SCALE): name for name in weights if name.endswith(SCALE)}
    return {
        name: dequantize(array, weights[scales[name]]) if name in scales else array
        for name, array in weights.items()
        if not name.endswith((SCALE, ".activation_scale"))
    }
