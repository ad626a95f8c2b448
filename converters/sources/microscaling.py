"""Reads MXFP4 and MXFP8: 32 codes share a power of two. MLX has both, so the bytes stay.

compressed-tensors (`mxfp4-pack-quantized`, Kimi-K3; `mxfp8-quantized`), ModelOpt, Quark and MiniMax
write them under different names; only the codes' words and the scales' bytes count. gpt-oss has a
layout of its own, which mlx-lm reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ...base.quant_config import mx_mode
from .packed import BYTES, EXPONENTS, Codes, Group, Packed, Stated

GROUP = 32


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of MXFP4 or MXFP8."""
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
    else:
        return None
    if columns % GROUP:
        return None

    def read(tensors: Mapping[str, mx.array]) -> Codes:
        return Codes(mx.contiguous(tensors[codes]).view(mx.uint32), tensors[scale])

    return Packed(group, mode.upper(), (*rows, columns), mx_mode(mode), read)
