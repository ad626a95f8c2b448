"""Codes of MLX's affine format, and how they are packed into 32-bit words.

A row's codes stand bit after bit, the lowest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...base.quant_config import QuantConfig


@dataclass(frozen=True)
class Codes:
    """A layer's codes on their grids: weight = code x scale + bias.

    Attributes:
        config: an affine configuration.
        codes: uint8 (..., rows, columns).
        scales, biases: (..., rows, columns / group), in the type that they are written in.
    """

    config: QuantConfig
    codes: np.ndarray
    scales: mx.array
    biases: mx.array

    def packed(self) -> dict[str, mx.array]:
        """`weight` (uint32), `scales` and `biases`, as MLX reads them."""
        words = mx.array(pack(self.codes, self.config.bits))
        return {"weight": words, "scales": self.scales, "biases": self.biases}


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes of any bit width.

    Args:
        codes: uint8 (..., columns), each below 2^bits; columns x bits is a multiple of 32.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        uint32 (..., columns x bits / 32).
    """
    if bits == 8:
        return np.ascontiguousarray(codes).view(np.uint32)

    # Each round joins two neighbours: the upper half's codes move down to those of the lower half.
    joined = np.ascontiguousarray(codes)
    width = bits
    for wider in ("<u2", "<u4", "<u8"):
        pairs = joined.view(wider)
        as_type = pairs.dtype.type
        half = 4 * pairs.itemsize
        lower = pairs & as_type(2**half - 1)
        upper = pairs >> as_type(half)
        joined = lower | (upper << as_type(width))
        width *= 2

    # Eight codes take as many bytes as a code has bits.
    packed = joined.view(np.uint8).reshape(*codes.shape[:-1], -1, 8)[..., :bits]
    return np.ascontiguousarray(packed).reshape(*codes.shape[:-1], -1).view(np.uint32)
