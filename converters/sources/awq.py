"""Reads AWQ: 4-bit integers packed along the outputs, eight in a word, in an order of their own.

`qweight` (columns, rows / 8) and `qzeros` (groups, rows / 8) hold rows 0, 2, 4, 6, 1, 3, 5, 7 of
eight from the lowest bits on. A weight is (code - zero) x scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .packed import (
    REALS,
    Group,
    Packed,
    Unread,
    affine_codes,
    affine_config,
    pack,
    spread,
)
from .stated import Stated, group_size

BITS = 4
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # where each of eight rows begins in its word


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of AWQ's layout.

    Raises:
        Unread: it is of another version than GEMM, or of shapes that don't fit.
    """
    if not {"qweight", "scales"} <= group.roles:
        return None
    version = _version(stated)
    if stated.method == "awq" and version not in ("gemm", "none"):
        raise Unread(
            f"is AWQ of version {version}, whose codes lie in another order than GEMM's, which "
            "mint-mlx reads"
        )
    if group.dtype("qweight") not in ("I32", "U32"):
        return None
    (columns, width), (groups, rows) = group.shape("qweight"), group.shape("scales")
    size = group_size(stated.of_layer(group.stem), columns, groups)
    if (
        size is None
        or group.dtype("scales") not in REALS
        or group.roles - {"qzeros"} != {"qweight", "scales"}
        or width * 32 != rows * BITS
        or ("qzeros" in group.roles and group.shape("qzeros") != (groups, width))
    ):
        raise Unread(
            f"has codes of shape {[columns, width]} and scales of shape {[groups, rows]}, which is "
            "neither GPTQ nor AWQ of 4 bits in version GEMM"
        )
    config = affine_config(BITS, columns, size)
    form = f"{BITS}-bit AWQ (one scale a group of {size})"

    def read(tensors: Mapping[str, mx.array]) -> Any:
        codes = mx.contiguous(_unpack(tensors["qweight"]).T)
        scales = mx.contiguous(tensors["scales"].T).astype(mx.float32)
        zeros = mx.full(scales.shape, 2 ** (BITS - 1), dtype=mx.float32)
        if "qzeros" in tensors:
            zeros = _unpack(tensors["qzeros"]).T.astype(mx.float32)
        if config:
            return affine_codes(pack(codes, BITS), scales, zeros, config, columns)
        values = codes.astype(mx.float32) - spread(zeros, columns, size)
        return values * spread(scales, columns, size)

    return Packed(group, form, (rows, columns), config, read, "qzeros" not in group.infos)


def _version(stated: Stated) -> str:
    """Which of AWQ's layouts config.json names: AutoAWQ's key, else GPTQModel's."""
    keys = ("version", "checkpoint_format", "format")
    named = [str(stated.table[key]).lower() for key in keys if stated.table.get(key)]
    return named[0] if named else "gemm"


def _unpack(words: mx.array) -> mx.array:
    """Codes (n, rows) of words (n, rows / 8)."""
    codes = words.view(mx.uint32)[..., None] >> mx.array(SHIFTS, dtype=mx.uint32) & 15
    return codes.reshape(words.shape[0], -1).astype(mx.uint8)
