"""Reads NVFP4: 16 codes share an E4M3 scale, and all of a weight one number.

compressed-tensors divides by that number (`weight_global_scale`), ModelOpt multiplies by its own
(`weight_scale_2`). MLX's mode has no such number for a linear layer, so weights are dequantized;
experts may stay (`--keep-nvfp4`), whose class takes the number times 2688.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from ...base.quant_config import NVFP4_GLOBAL, NVFP4_LARGEST, mx_mode
from .packed import BYTES, Codes, Group, Packed, Unread, dequantize
from .stated import Stated

GROUP = 16


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of NVFP4 in either dialect."""
    whole = "global_scale" if "global_scale" in group.infos else "scale_2"
    if whole not in group.infos or group.dtype("scale") != "F8_E4M3":
        return None
    codes = "packed" if "packed" in group.infos else ""
    if group.roles - {"shape"} != {codes, "scale", whole}:
        names = ", ".join(sorted(name.rpartition(".")[2] for name in group.names.values()))
        raise Unread(f"is NVFP4, but with other tensors than NVFP4 has ({names})")
    *rows, width = group.shape(codes)
    columns = 2 * width
    per_group = (*rows, columns // GROUP)
    if group.dtype(codes) not in BYTES or group.shape("scale") != per_group or columns % GROUP:
        raise Unread(
            f"is NVFP4 of shape {[*rows, columns]}, but its scales are of shape "
            f"{list(group.shape('scale'))}, which is not one for each {GROUP} columns"
        )
    _check_whole(group, whole, tuple(rows[:-1]))
    halved = group.shape(whole) == (*rows[:-1], 2) and len(rows) > 1

    def read(tensors: Mapping[str, mx.array]) -> tuple[Codes, mx.array]:
        """The codes, and the number for the whole weight, each expert, or each row of it."""
        packed = mx.contiguous(tensors[codes]).view(mx.uint32)
        factor = tensors[whole].astype(mx.float32)
        factor = 1 / factor if whole == "global_scale" else factor
        if halved:
            return Codes(packed, tensors["scale"]), mx.repeat(factor, rows[-1] // 2, axis=-1)
        return Codes(packed, tensors["scale"]), factor.reshape(rows[:-1] if factor.size > 1 else ())

    def dense(tensors: Mapping[str, mx.array]) -> mx.array:
        packed, factor = read(tensors)
        values = dequantize(packed, mx_mode("nvfp4"))
        if halved:
            return values * factor[..., None]
        return values * (factor[..., None, None] if factor.ndim else factor)

    def as_codes(tensors: Mapping[str, mx.array]) -> Codes:
        packed, factor = read(tensors)
        return replace(packed, global_scale=factor * NVFP4_LARGEST)

    if stated.keep_nvfp4 and not halved:
        return Packed(group, "NVFP4", (*rows, columns), NVFP4_GLOBAL, as_codes)
    return Packed(group, "NVFP4", (*rows, columns), None, dense)


def _check_whole(group: Group, whole: str, experts: tuple[int, ...]) -> None:
    """Refuse a number for the whole weight that is neither one nor one for each expert.

    Experts whose gate and up projections are one tensor have two, for each half of the rows.
    """
    shape = group.shape(whole)
    size = 1
    for n in shape:
        size *= n
    halves = [(*experts, 2)] if experts else []
    if size != 1 and shape not in [experts, (*experts, 1), (*experts, 1, 1), *halves]:
        raise Unread(
            f"is NVFP4, but {group.names[whole]} is of shape {list(shape)} instead of one number"
        )


def with_global_scale(weights: dict[str, mx.array], dtype: mx.Dtype) -> list[str]:
    """Dequantize experts that MLX's own NVFP4 holds with a number for each whole expert.

    No layer of stock MLX but a stack of experts takes such a number, and none on a CPU.

    Args:
        weights: parameters by their names in mlx-lm's model; changed.
        dtype: of the dequantized weights.

    Returns:
        The paths of the layers that are dense now.
    """
    paths = [n.removesuffix(".global_scale") for n in weights if n.endswith(".global_scale")]
    for path in paths:
        scale = weights.pop(f"{path}.global_scale")
        codes = Codes(weights[f"{path}.weight"], weights.pop(f"{path}.scales"), None, scale)
        weights[f"{path}.weight"] = dequantize(codes, mx_mode("nvfp4")).astype(dtype)
    return paths
