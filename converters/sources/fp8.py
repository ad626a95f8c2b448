"""Reads FP8: E4M3 codes times a scale, which many tools write, each in its own way.

The scales are called `weight_scale_inv` (DeepSeek-V3, Qwen3-FP8, transformers), `weight_scale`
(compressed-tensors, AutoFP8, ModelOpt, Quark, FBGEMM) or `scale` (DeepSeek-V4). All are multiplied
with the code, but for GPTQModel's: its `weight_scale_inv` divides, and a word in its config says
so. They are floats, or bytes that stand for powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from .packed import EXPONENTS, REALS, Group, Packed, Unread, exponents
from .scales import Block, find_block, in_words, stated_blocks, widen
from .stated import Stated

BLOCK: Block = (128, 128)  # where config.json names no blocks
SCALES = ("scale", "scale_inv")


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of FP8 codes with any of the known scales."""
    kind = group.dtype("")
    if kind == "F8_E5M2":
        raise Unread("is of type F8_E5M2, which mint-mlx does not read")
    # (Programs that know no 8-bit floats save the bytes.)
    is_bytes = kind == "U8" and stated.method == "fp8" and group.roles & set(SCALES)
    if kind != "F8_E4M3" and not is_bytes:
        return None
    role = next((r for r in SCALES if r in group.infos), None)
    if role is None:
        raise Unread(f"is FP8, but has no scales ({group.stem}_scale_inv or {group.stem}_scale)")
    others = group.roles - {"", role, "shape"}
    if "zero_point" in others and not stated.values(group.names["zero_point"]).any():
        others.remove("zero_point")  # of a symmetric weight
    if others:
        raise Unread(f"is FP8 beside a tensor that FP8 doesn't have ({group.names[others.pop()]})")
    return read_fp8(group, "", role, stated)


def read_fp8(group: Group, codes: str, scale: str, stated: Stated) -> Packed:
    """A weight of FP8 codes under one role, with scales under another.

    Of Llama-4's experts FBGEMM holds what writes back as (experts, inputs, outputs), and its scales
    as (experts, outputs, 1).

    Raises:
        Unread: type or shape of the scales are those of no known FP8.
    """
    shape, dtype = group.shape(codes), group.dtype(scale)
    if dtype not in (*REALS, *EXPONENTS):
        raise Unread(f"is FP8 with scales of type {dtype}, which mint-mlx does not read")
    scale_shape = group.shape(scale)
    turned = stated.method == "fbgemm_fp8" and len(scale_shape) == 3 and scale_shape[-1] == 1
    if turned:
        scale_shape = (scale_shape[0], 1, scale_shape[1])
    block = find_block(shape, scale_shape, stated, BLOCK)
    if block is None:
        expected = in_words((*stated_blocks(stated), BLOCK)[0])
        raise Unread(
            f"is FP8 of shape {list(shape)}, but its scales are of shape "
            f"{list(group.shape(scale))}, which is not that of FP8 {expected}"
        )
    form = in_words(block)
    divides = stated.table.get("weight_scale_semantics") == "inverse"

    def read(tensors: Mapping[str, mx.array]) -> mx.array:
        scales = exponents(tensors[scale]) if dtype in EXPONENTS else tensors[scale]
        scales = 1 / scales.astype(mx.float32) if divides else scales
        scales = scales.swapaxes(1, 2) if turned else scales
        return dequantize(tensors[codes], scales, block)

    return Packed(group, f"FP8 {form}", shape, None, read)


def dequantize(codes: mx.array, scales: mx.array, block: Block = BLOCK) -> mx.array:
    """E4M3(code) x scale of its block, in float32.

    Args:
        codes: uint8 (..., rows, columns).
        scales: floats, one for each block.
        block: rows and columns that share a scale.
    """
    values = mx.from_fp8(codes, dtype=mx.float32)
    return values * widen(scales, codes.shape, block)
