"""Reads `pack-quantized` of compressed-tensors: integers of 1 to 8 bits, without loss.

A weight is (code - zero) x scale, which is MLX's affine form with a bias of -zero x scale, and the
packed words are MLX's own (codes without a gap, the lowest bits first). A symmetric scheme has its
zero at 2^(bits - 1). Older versions left the rest of each word empty that no whole code of 3, 5, 6
or 7 bits fits into, under the same name of the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from ...base.quant_config import QuantConfig
from .packed import (
    REALS,
    Codes,
    Group,
    Packed,
    Unread,
    affine_codes,
    affine_config,
    pack,
    spread,
    unpack,
)
from .scales import as_block
from .stated import Stated

WORDS = ("I32", "U32")


@dataclass(frozen=True)
class _Scheme:
    """How codes lie in words.

    Attributes:
        bits: of a code.
        rows: of the weight, experts first where it has them.
        columns: of the weight.
        group: columns that share a scale.
        per_word: codes in a word where none spans two words; 0 for codes without a gap.
        block: rows that share a scale.
    """

    bits: int
    rows: tuple[int, ...]
    columns: int
    group: int
    per_word: int
    block: int = 1

    def words(self, count: int) -> int:
        """How many words so many codes take."""
        return -(-count // self.per_word) if self.per_word else -(-count * self.bits // 32)

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    @property
    def scale_rows(self) -> tuple[int, ...]:
        """Like `rows`, of the scales."""
        return (*self.rows[:-1], -(-self.rows[-1] // self.block))


def _per_scale(scheme: Mapping[str, Any]) -> str:
    """What shares a scale, as a scheme of config.json says it."""
    block = scheme.get("block_structure")
    if isinstance(block, list) and block:
        return f"in blocks of {'x'.join(map(str, block))}"
    size = scheme.get("group_size")
    return f"in groups of {size}" if size else f"with one scale a {scheme.get('strategy')}"


def match(group: Group, stated: Stated) -> Packed | None:
    """A weight of packed integers."""
    if group.dtype("packed") not in WORDS or group.dtype("scale") not in REALS:
        return None
    others = ", ".join(sorted(group.roles - {"packed", "scale", "shape", "zero_point", "g_idx"}))
    if others:
        raise Unread(f"is packed, but with tensors that pack-quantized doesn't have ({others})")
    schemes = _schemes(group, stated)
    if len(schemes) > 1:
        names = sorted(f"{scheme.bits} bits in groups of {scheme.group}" for scheme in schemes)
        known = _columns(group, stated) > 0
        raise Unread(
            f"may hold {' as well as '.join(names)}, and config.json does not tell which",
            needs_weights=not known,
        )
    if not schemes:
        expected = " or ".join(
            f"{scheme.get('num_bits')} bits {_per_scale(scheme)}" for scheme in stated.schemes
        )
        raise Unread(
            f"is packed in {group.shape('packed')[-1]} words a row with scales of shape "
            f"{list(group.shape('scale'))}, which is not that of "
            f"{expected or 'any scheme in config.json'}"
        )
    scheme = schemes.pop()
    _check_zeros(group, scheme)

    reordered = _is_reordered(group, scheme, stated)
    config = None if reordered else affine_config(scheme.bits, scheme.columns, scheme.group)
    kind = "asymmetric" if "zero_point" in group.infos else "symmetric"
    per = "row" if scheme.groups == 1 else f"group of {scheme.group}"
    if scheme.block > 1:
        per = f"block of {scheme.block}x{scheme.group}"
    form = f"{scheme.bits}-bit integers ({kind}, one scale a {per})"

    def read(tensors: Mapping[str, mx.array]) -> Any:
        return _read(tensors, scheme, config, reordered)

    symmetric = "zero_point" not in group.infos
    return Packed(group, form, (*scheme.rows, scheme.columns), config, read, symmetric)


def _schemes(group: Group, stated: Stated) -> set[_Scheme]:
    """The schemes of config.json that the shapes of a weight's tensors agree with.

    4 codes of 7 bits in a word, as older versions wrote them, are as wide as codes of 8 bits: there
    the names that a scheme is for tell, and then the version.
    """
    known = _columns(group, stated)
    matching = [
        (table, scheme) for table in stated.schemes for scheme in _schemes_of(table, group, known)
    ]
    if len({scheme for _, scheme in matching}) > 1:
        module = group.stem.removesuffix(".weight")
        named = [pair for pair in matching if _is_for(pair[0], module)]
        matching = named or matching
    schemes = {scheme for _, scheme in matching}
    newer = {scheme for scheme in schemes if not scheme.per_word}
    return newer if newer and _packs_without_gaps(stated) else schemes


def _schemes_of(table: Mapping[str, Any], group: Group, known: int) -> list[_Scheme]:
    """The ways in which codes of a scheme may lie in a weight, where the shapes allow any.

    Args:
        table: of `weights` in config.json.
        group: the weight.
        known: its columns, or 0.
    """
    *rows, width = group.shape("packed")
    *scale_rows, groups = group.shape("scale") or (1,)
    whole = prod(group.shape("scale")) == 1 or group.shape("scale") == tuple(rows)
    groups = 1 if whole else groups
    bits, (block, size) = table.get("num_bits"), _shared_by(table)
    if type(bits) is not int or not 1 <= bits <= 8 or table.get("type") != "int":
        return []

    # Codes without a gap, or those of older versions (where that can be told).
    columns = known or size * groups or width * 32 // bits
    older = (32 // bits,) if 32 % bits and (known or size) else ()
    schemes = []
    for per_word in (0, *older):
        group_size = min(size or columns, columns)
        scheme = _Scheme(bits, tuple(rows), columns, group_size, per_word, 1 if whole else block)
        fits = whole or scheme.scale_rows == tuple(scale_rows)
        if fits and scheme.words(columns) == width and scheme.groups == groups:
            schemes.append(scheme)
    return schemes


def _shared_by(table: Mapping[str, Any]) -> tuple[int, int]:
    """How many rows and columns share a scale by a scheme of config.json; 0 columns for all."""
    sizes = table.get("block_structure"), (1, table.get("group_size"))
    return next((block for block in map(as_block, sizes) if block), (1, 0))


def _is_for(table: Mapping[str, Any], module: str) -> bool:
    """Whether a scheme's `targets` name a module: by its name, or by a regular expression."""
    targets = table.get("targets")
    for target in targets if isinstance(targets, list) else []:
        try:
            if target == module or (target[:3] == "re:" and re.match(target[3:], module)):
                return True
        except (re.error, TypeError):  # no name of anything
            continue
    return False


def _packs_without_gaps(stated: Stated) -> bool:
    """Whether the version of compressed-tensors that wrote a config leaves no bits of a word empty.

    0.18 was the first.
    """
    version = re.match(r"(\d+)\.(\d+)", str(stated.table.get("version")))
    return version is not None and (int(version[1]), int(version[2])) >= (0, 18)


def _columns(group: Group, stated: Stated) -> int:
    """How many columns a weight has by its `weight_shape`; 0 where that isn't known."""
    if "shape" not in group.infos:
        return 0
    shape = stated.values(group.names["shape"])
    return int(shape[-1]) if shape.size else 0


def _check_zeros(group: Group, scheme: _Scheme) -> None:
    """Refuse zero points of another shape than the scales', whose rows may be packed."""
    if "zero_point" not in group.infos:
        return
    shape, rows = group.shape("zero_point"), scheme.scale_rows
    packed = (*rows[:-1], scheme.words(rows[-1]), scheme.groups)
    if shape != (packed if group.dtype("zero_point") in WORDS else group.shape("scale")):
        raise Unread(
            f"has zero points of shape {list(shape)}, which do not fit its scales of shape "
            f"{list(group.shape('scale'))}"
        )


def _is_reordered(group: Group, scheme: _Scheme, stated: Stated) -> bool:
    """Whether columns belong to groups in another order than their own.

    compressed-tensors begins with an index of -1, and takes one that still holds any for none.
    """
    if "g_idx" not in group.infos or scheme.groups == 1:
        return False
    has_order = any(table.get("actorder") in ("group", True) for table in stated.schemes)
    index = stated.values(group.names["g_idx"])
    plain = np.arange(scheme.columns) // scheme.group
    is_set = (index >= 0).all() and (has_order or index.any())
    return bool(is_set and not np.array_equal(index, plain))


def _read(
    tensors: Mapping[str, mx.array], scheme: _Scheme, config: QuantConfig | None, reordered: bool
) -> Codes | mx.array:
    """The codes of a weight, or its values where MLX has no such configuration."""
    bits, columns = scheme.bits, scheme.columns
    scales, zeros = _by_row(tensors["scale"], scheme), _zeros(tensors, scheme)
    if config and config.bits == bits and not scheme.per_word:
        words = tensors["packed"].view(mx.uint32)
        return affine_codes(words, scales, zeros, config, columns)
    codes = unpack(tensors["packed"], bits, columns, scheme.per_word)
    if config:
        return affine_codes(pack(codes, config.bits), scales, zeros, config, columns)

    # Each column gets its group's numbers.
    values = codes.astype(mx.float32)
    if reordered:
        index = tensors["g_idx"]
        return (values - mx.take(zeros, index, axis=-1)) * mx.take(scales, index, axis=-1)
    values = values - spread(zeros, columns, scheme.group)
    return values * spread(scales, columns, scheme.group)


def _by_row(numbers: mx.array, scheme: _Scheme) -> mx.array:
    """Scales or zero points as float32 (..., rows, groups), also where several rows share one."""
    numbers = numbers.astype(mx.float32)
    if numbers.size == 1:
        return mx.broadcast_to(numbers, (*scheme.rows, scheme.groups))
    numbers = numbers.reshape(*scheme.scale_rows, scheme.groups)
    if scheme.block == 1:
        return numbers
    return mx.repeat(numbers, scheme.block, axis=-2)[..., : scheme.rows[-1], :]


def _zeros(tensors: Mapping[str, mx.array], scheme: _Scheme) -> mx.array:
    """The codes that stand for zero, as float32 (..., rows, groups)."""
    middle = mx.array(2.0 ** (scheme.bits - 1))
    if "zero_point" not in tensors:
        return _by_row(middle, scheme)
    zeros = tensors["zero_point"]
    if zeros.dtype not in (mx.int32, mx.uint32):
        return _by_row(zeros.astype(mx.float32) + middle, scheme)

    # They are packed down the rows.
    across = mx.contiguous(zeros.swapaxes(-1, -2))
    codes = unpack(across, scheme.bits, scheme.scale_rows[-1], scheme.per_word)
    return _by_row(codes.swapaxes(-1, -2), scheme)
