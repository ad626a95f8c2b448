"""Reads MXFP4, MXFP6 and MXFP8: 32 codes share a power of two.

MLX has MXFP4 and MXFP8, so the bytes stay. Numbers of MXFP6 (E2M3) are whole eighths up to
60, which 8-bit codes hold.

compressed-tensors (`mxfp4-pack-quantized`, Kimi-K3; `mxfp8-quantized`), ModelOpt, Quark and MiniMax
write them under different names; only the codes' words and the scales' bytes count. gpt-oss has a
layout of its own, which mlx-lm reads.

AutoRound's MXINT4 looks the same, but for a word in its config: a code is a sign and a number of
quarters, which MLX's affine form holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ...base.quant_config import QuantConfig, mx_mode
from .packed import (
    BYTES,
    EXPONENTS,
    Codes,
    Group,
    Packed,
    Unread,
    affine_codes,
    exponents,
    pack,
    unpack,
)
from .stated import Stated

GROUP = 32


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of MXFP4, MXFP6, MXFP8 or MXINT4.

    Raises:
        Unread: its integers have another width.
    """
    scale = "scale_inv" if "scale_inv" in group.infos else "scale"
    if group.dtype(scale) not in EXPONENTS:
        return None
    codes = "packed" if "packed" in group.infos else ""
    if group.roles - {"shape"} != {codes, scale}:
        return None
    kind, (*rows, width) = group.dtype(codes), group.shape(codes)

    # Of four bits two are in a byte; the shapes of both must agree.
    if kind in BYTES and group.shape(scale) == (*rows, 2 * width // GROUP):
        columns, mode = 2 * width, "mxfp4"
    elif kind == "F8_E4M3" and group.shape(scale) == (*rows, width // GROUP):
        columns, mode = width, "mxfp8"
    elif _has_six_bits(stated) and group.shape(scale) == (*rows, width * 4 // 3 // GROUP):
        return _six_bits(group, codes, scale, (*rows, width * 4 // 3))
    else:
        return None
    if columns % GROUP:
        return None

    if _has_integers(group, stated):
        if mode != "mxfp4":
            raise Unread("holds integers of 8 bits with shared exponents (MXINT8)")
        return _integers(group, codes, scale, (*rows, columns))

    def read(tensors: Mapping[str, mx.array]) -> Codes:
        return Codes(mx.contiguous(tensors[codes]).view(mx.uint32), tensors[scale])

    return Packed(group, mode.upper(), (*rows, columns), mx_mode(mode), read)


def _has_six_bits(stated: Stated) -> bool:
    """Whether a scheme of compressed-tensors says so, whose 6-bit floats are E2M3."""
    return any((t.get("num_bits"), t.get("type")) == (6, "float") for t in stated.schemes)


def _six_bits(group: Group, codes: str, scale: str, shape: tuple[int, ...]) -> Packed | None:
    """A weight of MXFP6: bit 5 of a code is its sign, two are the exponent, three the mantissa."""
    columns = shape[-1]
    if group.dtype(codes) not in BYTES or columns % GROUP:
        return None
    config = QuantConfig(8, GROUP)
    eighths = [*range(8)] + [(8 + m) << e for e in range(3) for m in range(8)]

    def read(tensors: Mapping[str, mx.array]) -> Codes:
        stored = unpack(mx.contiguous(tensors[codes]).view(mx.uint32), 6, columns)
        size = mx.take(mx.array(eighths, dtype=mx.uint8), stored & 31)
        above_zero = mx.where(stored & 32, 64 - size, 64 + size).astype(mx.uint8)
        scales = exponents(tensors[scale].view(mx.uint8)) / 8
        return affine_codes(pack(above_zero, 8), scales, mx.array(64.0), config, columns)

    return Packed(group, "MXFP6", shape, config, read)


def _has_integers(group: Group, stated: Stated) -> bool:
    """Whether AutoRound's config says so, of this layer or of all."""
    return str(stated.of_layer(group.stem).get("data_type")).startswith("mx_int")


def _integers(group: Group, codes: str, scale: str, shape: tuple[int, ...]) -> Packed:
    """A weight of MXINT4: bit 3 of a code is its sign, the others are quarters."""
    config = QuantConfig(4, GROUP)
    columns = shape[-1]

    def read(tensors: Mapping[str, mx.array]) -> Codes:
        signed = unpack(mx.contiguous(tensors[codes]).view(mx.uint32), 4, columns)
        quarters = signed & 7
        above_zero = mx.where(signed & 8, 8 - quarters, 8 + quarters).astype(mx.uint8)
        scales = exponents(tensors[scale].view(mx.uint8)) / 4
        words = pack(above_zero, config.bits)
        return affine_codes(words, scales, mx.array(8.0), config, columns)

    return Packed(group, "MXINT4", shape, config, read)
