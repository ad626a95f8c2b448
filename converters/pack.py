"""Codes to MLX's packed words: a row's codes stand bit after bit, lowest first, in little-endian 32-bit words."""

from __future__ import annotations

import numpy as np


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
    planes = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    joined = np.packbits(planes.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(joined).view(np.uint32)
