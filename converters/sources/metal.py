"""Reads `metal` of transformers: MLX's affine codes of 2, 4 or 8 bits, whose biases are `qbiases`.

A weight is code x scale + bias, with both for each group of columns in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .packed import REALS, Codes, Group, Packed, Unread, affine_config, spread, unpack
from .stated import Stated

BITS = (2, 4, 8)


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of transformers' Metal quantization."""
    if group.dtype("") not in ("U32", "I32") or "qbiases" not in group.roles:
        return None
    (*rows, width), scales = group.shape(""), group.infos.get("scales")
    bits, size = stated.table.get("bits"), stated.table.get("group_size")
    if (
        bits not in BITS
        or type(size) is not int
        or scales is None
        or scales.dtype not in REALS
        or scales.shape != (*rows, width * 32 // bits // max(size, 1))
        or group.shape("qbiases") != scales.shape
        or group.roles != {"", "scales", "qbiases"}
    ):
        raise Unread(
            f"has codes of shape {[*rows, width]} and biases of shape "
            f"{list(group.shape('qbiases'))}, which is not that of metal with {bits} bits in "
            f"groups of {size}"
        )
    columns = width * 32 // bits
    config = affine_config(bits, columns, size)

    def read(tensors: Mapping[str, mx.array]) -> Any:
        numbers = [tensors[role].astype(mx.float32) for role in ("scales", "qbiases")]
        if config is None:
            codes = unpack(tensors[""], bits, columns).astype(mx.float32)
            scale, bias = (spread(number, columns, size) for number in numbers)
            return codes * scale + bias
        repeats = size // config.group_size
        scale, bias = (mx.repeat(number, repeats, axis=-1) for number in numbers)
        return Codes(tensors[""].view(mx.uint32), scale, bias)

    # Biases that have 16 bits already lose none.
    exact = group.dtype("qbiases") != "F32"
    form = f"{bits}-bit metal (one scale a group of {size})"
    return Packed(group, form, (*rows, columns), config, read, exact)
