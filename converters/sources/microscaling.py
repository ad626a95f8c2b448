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

from ...base.quant_config import mx_mode
from .packed import (
    BYTES,
    EXPONENTS,
    Codes,
    Group,
    Packed,
    Unread,
    affine_codes,
    affine_config,
    exponents,
    pack,
    unpack,
)
from .stated import Stated

GROUP = 32
# Sizes of MXINT4's codes in quarters, and of MXFP6's (two bits of exponent, three of mantissa) in
# eighths.
QUARTERS = tuple(range(8))
EIGHTHS = (*range(8), *((8 + m) << e for e in range(3) for m in range(8)))


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
    elif (
        kind in BYTES
        and _has_six_bits(stated)
        and group.shape(scale) == (*rows, width * 4 // 3 // GROUP)
    ):
        columns, mode = width * 4 // 3, "mxfp6"
    else:
        return None
    if columns % GROUP:
        return None

    if mode == "mxfp6":
        return _signed(group, "MXFP6", (codes, scale), columns, EIGHTHS, 8)
    if _has_integers(group, stated):
        if mode != "mxfp4":
            raise Unread("holds integers of 8 bits with shared exponents (MXINT8)")
        return _signed(group, "MXINT4", (codes, scale), columns, QUARTERS, 4)

    def read(tensors: Mapping[str, mx.array]) -> Codes:
        return Codes(mx.contiguous(tensors[codes]).view(mx.uint32), tensors[scale])

    return Packed(group, mode.upper(), (*rows, columns), mx_mode(mode), read)


def _has_six_bits(stated: Stated) -> bool:
    """Whether a scheme of compressed-tensors says so, whose 6-bit floats are E2M3."""
    return any((t.get("num_bits"), t.get("type")) == (6, "float") for t in stated.schemes)


def _has_integers(group: Group, stated: Stated) -> bool:
    """Whether AutoRound's config says so, of this layer or of all."""
    return str(stated.of_layer(group.stem).get("data_type")).startswith("mx_int")


def _signed(
    group: Group, form: str, roles: tuple[str, str], columns: int, sizes: tuple[int, ...], unit: int
) -> Packed:
    """A weight whose codes are a size, with its sign in the bit above.

    Args:
        group: its tensors.
        form: what it is, in words.
        roles: of its codes and its scales.
        columns: of the weight, whole groups.
        sizes: that a code without its sign stands for, in parts of one, 2^n of them.
        unit: how many parts make one.
    """
    codes, scale = roles
    sign, zero = len(sizes), 1 << max(sizes).bit_length()
    config = affine_config(zero.bit_length(), columns, GROUP)
    assert config is not None

    def read(tensors: Mapping[str, mx.array]) -> Codes:
        words = mx.contiguous(tensors[codes]).view(mx.uint32)
        stored = unpack(words, sign.bit_length(), columns)
        size = mx.take(mx.array(sizes, dtype=mx.uint8), stored & sign - 1)
        above_zero = mx.where(stored & sign, zero - size, zero + size).astype(mx.uint8)
        scales = exponents(tensors[scale].view(mx.uint8)) / unit
        words = pack(above_zero, config.bits)
        return affine_codes(words, scales, mx.array(float(zero)), config, columns)

    return Packed(group, form, (*group.shape(codes)[:-1], columns), config, read)
