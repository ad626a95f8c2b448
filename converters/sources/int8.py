"""Reads 8-bit integers times a scale: W8A8 of compressed-tensors (`int-quantized`), Quark.

A weight is (code - zero point) x scale, with a scale for the tensor, each row, or a group of
columns in a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from .packed import REALS, Group, Packed, Unread
from .scales import Block, find_block, in_words, widen
from .stated import Stated


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of 8-bit integers."""
    scale = "scale_inv" if "scale_inv" in group.infos else "scale"
    if group.dtype("") != "I8" or group.dtype(scale) not in REALS:
        return None
    others = ", ".join(sorted(group.roles - {"", scale, "zero_point"}))
    if others:
        raise Unread(f"is int8, but with tensors that int8 doesn't have ({others})")
    return read_int8(group, "", scale, stated)


def read_int8(group: Group, codes: str, scale: str, stated: Stated) -> Packed:
    """A weight of signed bytes under one role, with scales under another.

    Raises:
        Unread: the shapes don't fit each other.
    """
    shape = group.shape(codes)
    block = find_block(shape, group.shape(scale), stated) or _groups(shape, group.shape(scale))
    if block is None:
        raise Unread(
            f"is int8 of shape {list(shape)}, but its scales are of shape "
            f"{list(group.shape(scale))}"
        )
    has_zeros = "zero_point" in group.infos
    if has_zeros and group.shape("zero_point") != group.shape(scale):
        raise Unread("is int8 with zero points of another shape than its scales")

    def read(tensors: Mapping[str, mx.array]) -> mx.array:
        values = tensors[codes].astype(mx.float32)
        if has_zeros:
            values = values - widen(tensors["zero_point"], shape, block)
        return values * widen(tensors[scale], shape, block)

    return Packed(group, f"int8 {in_words(block)}", shape, None, read)


def _groups(weight: tuple[int, ...], scales: tuple[int, ...]) -> Block | None:
    """Groups of columns, where there are so many scales a row that they divide it."""
    if scales[:-1] == weight[:-1] and scales[-1] and weight[-1] % scales[-1] == 0:
        return 1, weight[-1] // scales[-1]
    return None
