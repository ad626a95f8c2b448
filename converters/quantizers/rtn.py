"""Round to nearest: MLX's own quantizer, from the weights alone."""

from __future__ import annotations

import mlx.core as mx

from ...base.errors import MintError
from ...base.quant_config import QuantConfig

MAX_LOST = 0.01  # of a layer's groups


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


def check_scales(
    path: str, weight: mx.array, packed: dict[str, mx.array], config: QuantConfig
) -> None:
    """Refuse a layer that nvfp4 turns into zeros.

    It has no scale for the whole tensor, and its own scales end at 2^-10.

    Args:
        path: the layer, for the message.
        weight: (..., rows, columns).
        packed: what `quantize` made of it.

    Raises:
        MintError: more than MAX_LOST of its groups become zeros.
    """
    if config.mode != "nvfp4":
        return
    largest = mx.abs(weight).reshape(*packed["scales"].shape, config.group_size).max(axis=-1)
    lost = float(mx.mean((packed["scales"] == 0) & (largest > 0)))
    if lost > MAX_LOST:
        raise MintError(
            f"{path} has weights too small for nvfp4's scales, {lost:.0%} of its groups would "
            f"become zeros: give --override '{path}=mxfp4', or another configuration"
        )
