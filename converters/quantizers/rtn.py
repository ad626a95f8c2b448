"""Round to nearest: MLX's own quantizer, from the weights alone."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ...base.errors import MintError
from ...base.quant_config import QuantConfig
from ...measure.affine_errors import SMALLEST_SCALE

MAX_LOST = 0.01  # of a layer's groups
SURELY_LARGE = 1e-6  # a scale that no group has whose largest weight is below SMALLEST_SCALE x 2
NEGLIGIBLE = 1e-3  # of the largest weight: groups of smaller ones may become zeros
# Exponents of mxfp4 and mxfp8 that no weight needs: 2^113. MLX's CPU quantizer wraps the byte of a
# group whose largest weight lies near 1e-38 around to one of these.
WRAPPED = 240


def quantize(weight: mx.array, config: QuantConfig) -> dict[str, mx.array]:
    """Quantize one layer with `mx.quantize`.

    Args:
        weight: (..., rows, columns) in the type that its scales shall have.
        config: a quantized configuration whose group divides the columns.

    Returns:
        `weight` (uint32, packed), `scales`, and `biases` where the mode has them.
    """
    if config.global_scale:
        raise MintError(f"mint-mlx makes no codes of {config}: give another configuration")
    packed = mx.quantize(weight, config.group_size, config.bits, mode=config.mode)
    return dict(zip(("weight", "scales", "biases"), packed, strict=False))


def check_scales(
    path: str, weight: mx.array, packed: Mapping[str, mx.array], config: QuantConfig
) -> None:
    """Refuse a layer that a mode turns into zeros, since its scales don't get so small.

    nvfp4 has no scale for the whole tensor, and its own scales end at 2^-10; those that MLX makes
    for affine codes end at 1e-7.

    Args:
        path: the layer, for the message.
        weight: (..., rows, columns).
        packed: what `quantize` made of it.
        config: its configuration.

    Raises:
        MintError: more than MAX_LOST of its groups become zeros, or nearly.
    """
    if config.mode not in ("nvfp4", "affine"):
        return
    scales = packed["scales"]
    if config.mode == "affine" and float(mx.min(mx.abs(scales))) > SURELY_LARGE:
        return
    largest = mx.abs(weight).reshape(*scales.shape, config.group_size).max(axis=-1)
    zeros = scales == 0
    if config.mode == "affine":
        zeros = (largest < 2 * SMALLEST_SCALE) & (mx.abs(scales) > 0.9 * SMALLEST_SCALE)
    lost = float(mx.mean(zeros & (largest > NEGLIGIBLE * largest.max())))
    if lost > MAX_LOST:
        instead = "mxfp4" if config.mode == "nvfp4" else "keep"
        raise MintError(
            f"{path} has weights too small for the scales of {config}, {lost:.0%} of its groups "
            f"would become zeros: give --override '{path}={instead}', or another configuration"
        )


def check_finite(path: str, packed: dict[str, mx.array], config: QuantConfig) -> None:
    """Refuse codes that stand for infinite weights.

    Args:
        path: the layer, for the message.
        packed: what a quantizer made of it.
        config: its configuration.

    Raises:
        MintError: a scale or a bias isn't finite, or makes a weight infinite.
    """
    if not config.quantized or is_finite(packed, config):
        return
    instead = "keep" if config.mode == "affine" else "8bit-g32"
    raise MintError(
        f"{path} has weights too small or too large for the scales of {config}, which would make "
        f"some of them infinite: give --override '{path}={instead}'"
    )


def is_finite(packed: Mapping[str, mx.array], config: QuantConfig) -> bool:
    """Whether every weight that the scales and biases allow is finite, computed in their type.

    Args:
        packed: `scales`, and `biases` where the mode has them.
        config: a quantized configuration.
    """
    scales = packed["scales"]
    if config.mode == "nvfp4":
        return not bool(mx.any((scales & 0x7F) == 0x7F))
    if config.mode != "affine":
        return int(scales.max()) < WRAPPED
    biases = packed["biases"]
    product = scales * mx.array(2**config.bits - 1, dtype=scales.dtype)
    return bool(mx.all(mx.isfinite(product + biases) & mx.isfinite(biases)))
