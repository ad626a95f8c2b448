"""Reads bitsandbytes: NF4 and FP4 (a table's values times a block's largest one), and int8.

Two codes of four bits lie in a byte, the first one in the high bits. The blocks run over the whole
weight, row after row. With double quantization the blocks' numbers are codes of 8 bits themselves.
What a weight's shape is stands in a tensor of JSON (`quant_state`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import mlx.core as mx

from .packed import Group, Packed, Unread
from .stated import Stated

INT8_LARGEST = 127


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of bitsandbytes."""
    if "SCB" in group.infos:
        return _int8(group, stated)
    if "absmax" not in group.infos:
        return None
    if not {"", "quant_map", "quant_state"} <= group.roles:
        raise Unread("is of bitsandbytes, but its quant_map or quant_state is missing")
    state = _state(group, stated)
    shape, block = tuple(state["shape"]), state["blocksize"]
    kind = str(state.get("quant_type", "4 bits")).upper()
    is_double = "nested_absmax" in group.infos
    form = f"bitsandbytes {kind}{', doubly quantized' if is_double else ''}"

    def read(tensors: Mapping[str, mx.array]) -> mx.array:
        packed = tensors[""].reshape(-1).view(mx.uint8)
        codes = mx.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: prod(shape)]
        values = mx.take(tensors["quant_map"].astype(mx.float32), codes.astype(mx.uint32))
        largest = mx.repeat(_absmax(tensors, state), block)[: prod(shape)]
        return (values * largest).reshape(shape)

    return Packed(group, form, shape, None, read)


def _state(group: Group, stated: Stated) -> dict[str, Any]:
    """What the JSON beside a 4-bit weight says of it.

    Raises:
        Unread: it isn't there, or its shape isn't that of the weight's bytes.
    """
    raw = stated.values(group.names["quant_state"])
    if not raw.any():
        raise Unread(
            "is of bitsandbytes, which states the shape of a weight inside the weights",
            "download the checkpoint, and give its folder",
            needs_weights=True,
        )
    try:
        state = json.loads(raw.tobytes())
        shape, block = state["shape"], state["blocksize"]
        blocks = -(-prod(shape) // block)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise Unread(f"has a damaged {group.names['quant_state']}") from None

    info = group.infos[""]
    nbytes = -(-prod(shape) // 2)
    if info.end - info.start != nbytes or prod(group.shape("absmax")) != blocks:
        raise Unread(f"is of shape {shape} by its quant_state, which its bytes are not")
    return dict(state)


def _absmax(tensors: Mapping[str, mx.array], state: dict[str, Any]) -> mx.array:
    """The largest value of each block, float32 (blocks,)."""
    absmax = tensors["absmax"].reshape(-1)
    if "nested_absmax" not in tensors:
        return absmax.astype(mx.float32)
    values = mx.take(tensors["nested_quant_map"].astype(mx.float32), absmax.astype(mx.uint32))
    nested = mx.repeat(tensors["nested_absmax"].astype(mx.float32), state["nested_blocksize"])
    return values * nested[: absmax.size] + state["nested_offset"]


def _int8(group: Group, stated: Stated) -> Packed:
    """A weight of LLM.int8: code x largest of the row / 127."""
    if group.dtype("") != "I8" or group.shape("SCB") != group.shape("")[:1]:
        raise Unread("is int8 of bitsandbytes, but its SCB has no number for each row")
    if "weight_format" in group.infos and stated.values(group.names["weight_format"]).any():
        raise Unread("is int8 of bitsandbytes in an order of columns that only a GPU kernel knows")

    def read(tensors: Mapping[str, mx.array]) -> mx.array:
        scale = tensors["SCB"].astype(mx.float32) / INT8_LARGEST
        return tensors[""].astype(mx.float32) * scale[:, None]

    return Packed(group, "bitsandbytes int8", group.shape(""), None, read)
