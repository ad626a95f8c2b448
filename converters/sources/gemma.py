"""Reads `gemma` of transformers: integers of 2, 4 or 8 bits with one scale a row (Gemma-4 QAT).

A weight is (code - 2^(bits - 1)) x scale; codes of 8 bits are signed. An embedding is called
`embedding_quantized`, and may have a scale for each of several blocks in a row. What their shapes
don't tell, config.json says by patterns of names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .packed import BYTES, REALS, Group, Packed, Unread, affine_codes, affine_config, spread
from .stated import Stated

METHOD = "gemma"


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of Gemma's own quantization."""
    codes, scale = ("embedding", "embedding_scale") if "embedding" in group.roles else ("", "scale")
    if stated.method != METHOD or not {codes, scale} <= group.roles:
        return None
    kind, bits = group.dtype(codes), _bits(group.stem.removesuffix(".weight"), stated)
    *rows, width = group.shape(codes)
    columns = width if kind == "I8" else width * 8 // bits
    *scale_rows, blocks = group.shape(scale) or (0,)
    if (
        group.roles != {codes, scale}
        or kind not in BYTES
        or group.dtype(scale) not in REALS
        or (kind == "I8") != (bits == 8)
        or len(rows) != 1
        or scale_rows != rows
        or not blocks
        or columns % blocks
    ):
        raise Unread(
            f"has codes of type {kind} and shape {[*rows, width]} and scales of shape "
            f"{list(group.shape(scale))}, which is not that of gemma with {bits} bits"
        )
    size = columns // blocks
    config = affine_config(bits, columns, size)
    per = "row" if blocks == 1 else f"group of {size}"

    def read(tensors: Mapping[str, mx.array]) -> Any:
        packed = tensors[codes]
        if kind == "I8":
            packed = packed.view(mx.uint8) ^ 128  # from signed to unsigned codes
        scales = tensors[scale].astype(mx.float32)
        zeros = mx.full(scales.shape, 2 ** (bits - 1), dtype=mx.float32)
        if config is not None:
            words = mx.contiguous(packed).view(mx.uint32)
            return affine_codes(words, scales, zeros, config, columns)
        values = _codes(packed, bits).astype(mx.float32) - spread(zeros, columns, size)
        return values * spread(scales, columns, size)

    form = f"{bits}-bit integers of Gemma (symmetric, one scale a {per})"
    return Packed(group, form, (*rows, columns), config, read)


def _bits(module: str, stated: Stated) -> int:
    """How many bits a module's codes have, by the first pattern in its name, else by default.

    Raises:
        Unread: config.json says another number than 2, 4 or 8.
    """
    bits = stated.table.get("num_bits", 4)
    patterns = stated.table.get("module_quant_configs") or {}
    try:
        starts = {
            found.start(): options.get("num_bits", bits)
            for pattern, options in reversed(patterns.items())
            if (found := re.search(pattern, module))
        }
    except (re.error, AttributeError, TypeError):
        raise Unread("is of gemma, but module_quant_configs in config.json is damaged") from None
    if starts:
        bits = starts[min(starts)]
    if bits not in (2, 4, 8):
        raise Unread(f"is of gemma with {bits} bits by config.json, not 2, 4 or 8")
    return int(bits)


def _codes(packed: mx.array, bits: int) -> mx.array:
    """Codes (uint8) of bytes, the lowest bits first."""
    if bits == 8:
        return packed
    shifts = mx.arange(8 // bits, dtype=mx.uint8) * bits
    codes = packed[..., None] >> shifts & (2**bits - 1)
    return codes.reshape(packed.shape[0], -1)
