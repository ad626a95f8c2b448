"""Round to nearest: MLX's own quantizer, weights alone."""

from __future__ import annotations

import mlx.core as mx

from ..quant import QuantConfig


def quantize(weight: mx.array, config: QuantConfig) -> dict[str, mx.array]:
    """Quantize one layer with `mx.quantize`.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        config: a quantized configuration whose group divides the columns.

    Returns:
        `weight` (uint32, packed), `scales`, and `biases` where the mode has them.
    """
    packed = mx.quantize(weight, config.group_size, config.bits, mode=config.mode)
    return dict(zip(("weight", "scales", "biases"), packed, strict=False))
