"""Reads torchao's float8 and int8: the tensors of a subclass, flattened by its own saving.

`_weight_qdata` holds the codes of a weight, `_weight_scale` its scales and `_weight_zero_point` its
zero points. Codes of four bits lie in an order that depends on the kernel, and are not read.
"""

from __future__ import annotations

from dataclasses import replace

from .fp8 import read_fp8
from .int8 import read_int8
from .packed import REALS, Group, Packed, Stated, Unread


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of torchao."""
    kind = group.dtype("qdata")
    if kind is None:
        return None
    if group.dtype("scale") not in REALS or kind not in ("F8_E4M3", "I8"):
        raise Unread(f"is packed by torchao as {kind}, which mint-mlx does not read")
    read = read_fp8 if kind == "F8_E4M3" else read_int8
    weight = read(group, "qdata", "scale", stated)
    return replace(weight, form=f"torchao {weight.form}")
