"""Reads torchao's float8 and int8: the tensors of a subclass, flattened by its own saving.

`_weight_qdata` holds the codes of a weight, `_weight_scale` its scales and `_weight_zero_point` its
zero points. Codes of four bits lie in an order that depends on the kernel, and are not read.
"""

from __future__ import annotations

from dataclasses import replace

from .fp8 import read_fp8
from .int8 import read_int8
from .packed import REALS, Group, Packed, Unread, smoothed
from .stated import Stated

# What torchao's types of codes and scales are; its float8 and int8 have scales that are numbers.
OTHERS = {
    ("F8_E4M3", "F8_E8M0"): "MXFP8",
    ("U8", "F8_E8M0"): "MXFP4",
    ("U8", "F8_E4M3"): "NVFP4",
}


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of torchao."""
    kind = group.dtype("qdata")
    if kind is None:
        return None
    if "act_pre_scale" in group.infos:
        raise smoothed("torchao", "act_pre_scale")
    name = OTHERS.get((kind, group.dtype("scale") or ""))
    if name:
        raise Unread(f"is {name} of torchao, whose scales lie in the order of its kernels")
    if group.dtype("scale") not in REALS or kind not in ("F8_E4M3", "I8"):
        raise Unread(f"is packed by torchao as {kind}, which mint-mlx does not read")
    rows, scales = group.shape("qdata")[0], group.shape("scale")
    if kind == "I8" and len(scales) == 2 and scales[0] != rows == scales[1]:
        raise Unread("is int4 of torchao, which mint-mlx does not read")
    read = read_fp8 if kind == "F8_E4M3" else read_int8
    weight = read(group, "qdata", "scale", stated)
    return replace(weight, form=f"torchao {weight.form}")
