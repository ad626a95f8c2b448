"""Reads BitNet as transformers stores it: weights of three values times one number, without loss.

A byte holds four weights of a column, which lie a quarter of the rows apart, the first in the
lowest bits; codes of 0 to 2 are -1 to 1. `weight_scale` divides them in layers of the class
`bitlinear`, and multiplies them in those of `autobitlinear`. That inputs are rounded to 8 bits when
it runs is left out, as of all formats. mlx-lm's class `bitnet` reads such tensors itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import mlx.core as mx

from .packed import (
    EMBEDDING,
    REALS,
    Codes,
    Group,
    Packed,
    Unread,
    affine_codes,
    affine_config,
    pack,
)
from .stated import Stated

PER_BYTE = 4  # weights


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of BitNet.

    Raises:
        Unread: it becomes one of three values only when it runs, or has a norm of its own.
    """
    if stated.method != "bitnet":
        return None
    if group.stem.endswith(".rms_norm.weight"):
        raise Unread(
            "is a norm before a single layer (BitNet's use_rms_norm), for which mlx-lm's classes "
            "have no place"
        )
    kind, scale = group.dtype(""), group.dtype("scale")
    has_scale = scale in REALS and prod(group.shape("scale")) == 1
    if group.roles == {""} and kind in REALS and _is_rounded(group, stated):
        raise Unread("is rounded to three values only when it runs (BitNet), and not packed")
    if group.roles != {"", "scale"} or not has_scale or len(group.shape("")) != 2:
        return None

    multiplies = stated.table.get("linear_class") == "autobitlinear"
    if kind == "U8":
        return _packed(group, multiplies)
    if kind in REALS and multiplies:
        return _unpacked(group)
    return None


def _is_rounded(group: Group, stated: Stated) -> bool:
    """Whether a weight that isn't packed is one of a layer that BitNet replaces."""
    if stated.table.get("quantization_mode") != "online":
        return False
    kept = stated.table.get("modules_to_not_convert")
    names = kept if isinstance(kept, list) else ["lm_head"]
    module = group.stem.removesuffix(".weight")
    if len(group.shape("")) != 2 or not group.stem.endswith(".weight"):
        return False
    return not EMBEDDING.search(group.stem) and not any(str(name) in module for name in names)


def _packed(group: Group, multiplies: bool) -> Packed:
    """A weight of bytes."""
    height, columns = group.shape("")
    config = affine_config(2, columns, columns)

    def read(tensors: Mapping[str, mx.array]) -> Any:
        quarters = [tensors[""] >> 2 * i & 3 for i in range(PER_BYTE)]
        codes = mx.concatenate(quarters).astype(mx.uint8)
        size = tensors["scale"].astype(mx.float32).reshape(1, 1)
        size = size if multiplies else 1 / size
        if config is None:
            return (codes.astype(mx.float32) - 1) * size
        scales = mx.broadcast_to(size, (codes.shape[0], 1))
        return affine_codes(pack(codes, 2), scales, mx.array(1.0), config, columns)

    form = "BitNet (three values times one number)"
    return Packed(group, form, (PER_BYTE * height, columns), config, read)


def _unpacked(group: Group) -> Packed:
    """A weight of numbers, each one of three."""

    def read(tensors: Mapping[str, mx.array]) -> Codes | mx.array:
        return tensors[""].astype(mx.float32) * tensors["scale"].astype(mx.float32)

    return Packed(group, "BitNet (three values, not packed)", group.shape(""), None, read)
