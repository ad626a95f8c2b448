"""Reads GPTQ and AutoRound: integers packed along the inputs, which MLX holds the other way round.

`qweight` (columns * bits / 32, rows) has codes without a gap, the lowest bits first: transposed it
is MLX's own packing. Only GPTQModel's `gptq_p`, and all that it writes with 5, 6 or 7 bits, has the
low and the high bits of 32 codes in words of their own.

A weight is (code - zero) x scale. `qzeros` holds zero - 1 in the formats `gptq` and
`auto_round:auto_gptq`, and zero itself in `gptq_v2`, `gptq_p`, `auto_round` and
`auto_round:gptqmodel`. Where codes fill words GPTQModel takes the ones from whole words, so that a
zero of 0 borrows from its neighbour, and adds them to whole words again.

An embedding is packed along the vocabulary: read so, it lies on its side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .packed import (
    EMBEDDING,
    REALS,
    Group,
    Packed,
    Unread,
    affine_codes,
    affine_config,
    pack,
    unpack,
)
from .stated import Stated, group_size

WORDS = ("I32", "U32")
TENSORS = {"qweight", "qzeros", "scales", "g_idx"}
# The formats whose zero points are stored less one; "" where config.json names none.
LESS_ONE = {"", "gptq", "gemm"}
# AutoRound's own, which may also be called after the tool: `auto_round:auto_gptq`.
AUTO_ROUND_LESS_ONE = re.compile(r"|auto|(?!.*gptqmodel).*gptq.*")

# The widths of the planes that a code of GPTQModel's own layout is split into, the lowest first.
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of GPTQ's layout."""
    if group.dtype("qweight") not in WORDS or not {"qzeros", "scales"} <= group.roles:
        return None
    (height, rows), (groups, outputs) = group.shape("qweight"), group.shape("scales")
    if outputs != rows or group.dtype("scales") not in REALS:
        return None  # AWQ's codes are packed along the outputs
    if group.roles - TENSORS:
        others = ", ".join(sorted(group.roles - TENSORS))
        raise Unread(f"is GPTQ, but with tensors that GPTQ doesn't have ({others})")

    # Zero points are packed along the outputs, whose number is known: they tell the width.
    bits = group.shape("qzeros")[-1] * 32 // rows
    columns = group.shape("g_idx")[0] if "g_idx" in group.infos else height * 32 // max(bits, 1)
    if (
        bits not in range(2, 9)
        or group.shape("qzeros") != (groups, -(-rows * bits // 32))
        or height != -(-columns * bits // 32)
    ):
        raise Unread(
            f"is GPTQ with codes of shape {[height, rows]} and zero points of shape "
            f"{list(group.shape('qzeros'))}, which do not fit each other"
        )
    of_layer = replace(stated, table=stated.of_layer(group.stem))
    size = group_size(of_layer.table, columns, groups)
    if size is None:
        raise Unread(f"is GPTQ with {groups} groups, which {columns} columns do not fall into")
    planar = _is_planar(stated, bits)
    reordered = _is_reordered(group, stated, columns, size)
    config = None if reordered else affine_config(bits, columns, size)
    per = "row" if groups == 1 else f"group of {size}"
    kind = "asymmetric" if of_layer.table.get("sym") is False else "symmetric"
    order = ", columns reordered" if reordered else ""
    form = f"{bits}-bit GPTQ ({kind}, one scale a {per}{order})"
    lies_on_its_side = _by_gptqmodel(stated) and EMBEDDING.search(group.stem) is not None
    if lies_on_its_side:
        config = None

    def read(tensors: Mapping[str, mx.array]) -> Any:
        words = mx.contiguous(tensors["qweight"].T).view(mx.uint32)
        scales = mx.contiguous(tensors["scales"].T).astype(mx.float32)
        zeros = _zeros(tensors["qzeros"], bits, rows, of_layer).T.astype(mx.float32)
        if config and config.bits == bits and not planar:
            return affine_codes(words, scales, zeros, config, columns)
        codes = _codes(words, bits, columns, planar)
        if config:
            return affine_codes(pack(codes, config.bits), scales, zeros, config, columns)
        index = tensors["g_idx"] if reordered else mx.arange(columns) // size
        values = codes.astype(mx.float32) - mx.take(zeros, index, axis=-1)
        values *= mx.take(scales, index, axis=-1)
        return values.T if lies_on_its_side else values

    shape = (columns, rows) if lies_on_its_side else (rows, columns)
    return Packed(group, form, shape, config, read, _all_symmetric(stated.table))


def _all_symmetric(table: Mapping[str, Any]) -> bool:
    """Whether no weight has zero points of other values than the middle.

    GPTQModel's `dynamic` and AutoRound's `extra_config` may say otherwise of single layers."""
    tables = [table.get(key) or {} for key in ("dynamic", "extra_config")]
    overrides = [each for by_name in tables for each in by_name.values() if isinstance(each, dict)]
    return table.get("sym") is True and all(each.get("sym", True) for each in overrides)


def _is_reordered(group: Group, stated: Stated, columns: int, size: int) -> bool:
    """Whether columns belong to groups in another order than their own (`desc_act`)."""
    if "g_idx" not in group.infos or size >= columns:
        return False
    if stated.table.get("desc_act") is True and stated.table.get("static_groups") is not True:
        return True
    index = stated.values(group.names["g_idx"])
    return bool(index.any() and not np.array_equal(index, np.arange(columns) // size))


def _is_planar(stated: Stated, bits: int) -> bool:
    """Whether the bits of a code lie in several words; AutoRound packs all widths without a gap."""
    is_autoround = stated.method.endswith("auto-round") or "autoround_version" in stated.table
    return bits in PLANES and (_format(stated) == "gptq_p" or (bits != 3 and not is_autoround))


def _codes(words: mx.array, bits: int, count: int, planar: bool) -> mx.array:
    """Codes (..., count) as uint8 from words (..., words)."""
    if not planar:
        return unpack(words, bits, count)
    words = words.view(mx.uint32).reshape(*words.shape[:-1], -1, bits)
    codes = mx.zeros((*words.shape[:-1], 32), dtype=mx.uint8)
    offset = 0
    for width in PLANES[bits]:
        plane = unpack(words[..., offset : offset + width], width, 32)
        codes = codes | plane << offset
        offset += width
    return codes.reshape(*words.shape[:-2], -1)[..., :count]


def _zeros(qzeros: mx.array, bits: int, rows: int, stated: Stated) -> mx.array:
    """The zero points (groups, rows) as codes, with what the format takes from them added again."""
    planar = _is_planar(stated, bits)
    codes = _codes(qzeros, bits, rows, planar)
    top = 2**bits - 1
    zeros = codes
    if _takes_one(stated, bits):
        zeros = codes + 1 & top
        if 32 % bits == 0 and _by_gptqmodel(stated):
            ones = mx.array((2**32 - 1) // top, dtype=mx.uint32)
            zeros = _codes(qzeros.view(mx.uint32) + ones, bits, rows, planar)

    # A symmetric weight has its zero in the middle, whatever its format is called.
    if stated.table.get("sym") is True:
        middle = 2 ** (bits - 1)
        zeros = mx.where((codes == middle).all(), codes, zeros)
        zeros = mx.where((codes == middle - 1).all(), codes + 1, zeros)
    return zeros


def _by_gptqmodel(stated: Stated) -> bool:
    """Whether config.json says that GPTQModel wrote the checkpoint."""
    meta = stated.table.get("meta")
    written_by = meta.get("quantizer") if isinstance(meta, dict) else None
    names = written_by if isinstance(written_by, list) else [written_by]
    return any(str(name).lower().startswith("gptqmodel") for name in names)


def _format(stated: Stated) -> str:
    """The name of the layout that config.json gives; '' where it gives none."""
    keys = ("packing_format", "checkpoint_format", "format", "backend")
    return next((str(stated.table[k]).lower() for k in keys if stated.table.get(k)), "")


def _takes_one(stated: Stated, bits: int) -> bool:
    """Whether a format stores zero points less one."""
    if _is_planar(stated, bits):
        return False
    name = _format(stated)
    if stated.method.endswith("auto-round"):
        # Where it never loaded the model, each layer goes by what is said of that layer.
        if stated.table.get("model_free"):
            return stated.table.get("sym") is not False
        return AUTO_ROUND_LESS_ONE.fullmatch(name) is not None
    return name in LESS_ONE


def without_zero_biases(model: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors without the biases of zeros that old versions of AutoGPTQ give every layer.

    Args:
        model: of mlx-lm; what it has a parameter for stays.
        weights: a checkpoint's tensors by name.
    """
    parameters = {name for name, _ in tree_flatten(model.parameters())}

    def is_surplus(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf == "bias" and f"{module}.qweight" in weights and name not in parameters

    return {n: a for n, a in weights.items() if not is_surplus(n) or bool(mx.any(a))}
