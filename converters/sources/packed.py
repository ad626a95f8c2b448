"""Weights as quantization tools store them: in several tensors, whose names begin alike.

A format's file (fp8.py, gptq.py, ...) has a function `match(group, stated)`, which looks at the
tensors of one weight, their types and shapes, and says how the weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...base.quant_config import AFFINE_BITS, AFFINE_GROUPS, NVFP4_LARGEST, QuantConfig
from ...base.safetensors_header import TensorInfo

EXPONENTS = ("U8", "F8_E8M0")  # types of a scale that is a power of two, 2^(byte - 127)
REALS = ("F32", "BF16", "F16")  # types of a scale that is a number
BYTES = ("U8", "I8")
# The names of embeddings; a head is packed as other layers are.
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|embeddings?)\.weight$")

# What follows a weight's name in the names of the tensors that belong to it.
_COMPANION = re.compile(
    r"(.+?)(?:_weight)?_(packed|shape|scale|scale_inv|scale_2|global_scale|zero_point|g_idx)$"
)
# The same for bitsandbytes, whose names follow after a dot; GPTQModel's after an underscore.
_STATE = re.compile(r"(.+\.weight)[._](absmax|quant_map|nested_\w+|quant_state)(?:\.\w+)?$")
# Tensors that stand beside `weight` in a module, or in its place; values are their roles.
_IN_MODULE = {
    "qweight": "qweight",
    "qzeros": "qzeros",
    "SCB": "SCB",
    "weight_scb": "SCB",
    "weight_format": "weight_format",
    "pre_quant_scale": "pre_quant_scale",
    "_weight_qdata": "qdata",
    "_weight_scale": "scale",
    "_weight_zero_point": "zero_point",
    "_weight_act_pre_scale": "act_pre_scale",
    "_weight_act_quant_scale": "act_quant_scale",
    "embedding_quantized": "embedding",
    "embedding_scale": "embedding_scale",
}
# Those that mean something only beside another tensor of the module.
_BESIDE = {
    "g_idx": ("qweight",),
    "qbiases": ("weight",),
    "scale": ("weight",),
    "scales": ("qweight", "weight"),
}


class Unread(Exception):
    """Why a weight can't be read; the text continues a sentence that begins with its name.

    Attributes:
        instead: what to do; None for giving the original.
        needs_weights: whether it could be read if the weights were on this machine.
    """

    def __init__(
        self, reason: str, instead: str | None = None, needs_weights: bool = False
    ) -> None:
        super().__init__(reason)
        self.instead = instead
        self.needs_weights = needs_weights


def smoothed(tool: str, role: str) -> Unread:
    """The refusal of a weight whose inputs are scaled when it runs."""
    return Unread(
        f"was smoothed by {tool} (AWQ or SmoothQuant): its inputs are scaled when it runs "
        f"({role}), for which MLX has no place"
    )


@dataclass(frozen=True)
class Group:
    """The tensors of one weight.

    Attributes:
        stem: the name that the weight has where it isn't quantized.
        names: of the tensors, by what follows the stem; '' for the tensor of that name itself.
        infos: types and shapes, by the same keys.
    """

    stem: str
    names: dict[str, str]
    infos: dict[str, TensorInfo]

    @property
    def roles(self) -> set[str]:
        return set(self.infos)

    def shape(self, role: str) -> tuple[int, ...]:
        return self.infos[role].shape

    def dtype(self, role: str) -> str | None:
        """The safetensors code of a tensor's type; None where there is no such tensor."""
        return self.infos[role].dtype if role in self.infos else None


@dataclass(frozen=True)
class Codes:
    """A weight in MLX's own packing.

    Attributes:
        weight: uint32 (..., rows, columns * bits / 32).
        scales: float32 (..., rows, groups); uint8 in the modes other than affine.
        biases: float32 like the scales; None in the other modes.
        global_scale: float32, one for each expert or one alone; None but in nvfp4.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None
    global_scale: mx.array | None = None


@dataclass(frozen=True)
class Packed:
    """How one quantized weight of a source is read.

    Attributes:
        group: its tensors.
        form: what it is, in words.
        shape: of the weight.
        config: the configuration of MLX that holds the very same values; None where there is none,
            so that the weight is dequantized.
        read: from the loaded tensors by role to `Codes` where there is a configuration, else to the
            weight in float32. Nothing is evaluated.
        symmetric: whether its zero points lie in the middle, so that biases are scales times a
            power of two; others lose digits in 16 bits.
    """

    group: Group
    form: str
    shape: tuple[int, ...]
    config: QuantConfig | None
    read: Callable[[Mapping[str, mx.array]], Any]
    symmetric: bool = True


def dequantize(codes: Codes, config: QuantConfig) -> mx.array:
    """The float32 weight that codes stand for: code x scale + bias."""
    values = mx.dequantize(
        codes.weight,
        codes.scales,
        codes.biases,
        config.group_size,
        config.bits,
        config.mode,
        dtype=mx.float32,
    )
    if codes.global_scale is None:
        return values
    factor = codes.global_scale / NVFP4_LARGEST
    return values * factor.reshape(*factor.shape, *[1] * (values.ndim - factor.ndim))


def group_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, Group]:
    """All tensors by the weight that they belong to; those that belong to none stand alone."""
    groups: dict[str, Group] = {}
    for name, info in tensors.items():
        stem, role = _belongs_to(name, tensors)
        group = groups.setdefault(stem, Group(stem, {}, {}))
        group.names[role] = name
        group.infos[role] = info
    return groups


def _belongs_to(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """The name of the weight that a tensor belongs to, and its role there."""
    module, _, leaf = name.rpartition(".")
    weight = f"{module}.weight"
    if leaf in _IN_MODULE:
        return weight, _IN_MODULE[leaf]
    beside = (tensors.get(f"{module}.{other}") for other in _BESIDE.get(leaf, ()))
    if any(info is not None and _is_packed(info) for info in beside):
        return weight, leaf

    for pattern in (_STATE, _COMPANION):
        match = pattern.fullmatch(name)
        if match and (match[1].endswith(".weight") or match[1] in tensors):
            return match[1], match[2]
    return name, ""


def _is_packed(info: TensorInfo) -> bool:
    return info.dtype not in REALS


def exponents(scale: mx.array) -> mx.array:
    """The float32 powers of two, 2^(byte - 127), that bytes (uint8) stand for; 255 is NaN."""
    bits = mx.where(scale == 0, mx.array(1 << 22, mx.uint32), scale.astype(mx.uint32) << 23)
    return mx.where(scale == 255, mx.array(mx.nan, mx.float32), bits.view(mx.float32))


def unpack(words: mx.array, bits: int, count: int, per_word: int = 0) -> mx.array:
    """Codes from words, the lowest bits first, along the last axis.

    Args:
        words: int32 or uint32 (..., words).
        bits: of a code.
        count: how many codes there are; the rest is padding.
        per_word: codes in a word where none spans two words; 0 for codes without a gap.

    Returns:
        uint8 (..., count).
    """
    words = words.view(mx.uint32)
    per_word = per_word or (32 // bits if 32 % bits == 0 else 0)
    if per_word:
        shifts = mx.arange(per_word, dtype=mx.uint32) * bits
        codes = (words[..., None] >> shifts & (2**bits - 1)).astype(mx.uint8)
        return codes.reshape(*words.shape[:-1], -1)[..., :count]

    # A code may span two words: take them apart to single bits.
    single = (words[..., None] >> mx.arange(32, dtype=mx.uint32) & 1).astype(mx.uint8)
    single = single.reshape(*words.shape[:-1], -1)[..., : count * bits]
    digits = single.reshape(*words.shape[:-1], count, bits) << mx.arange(bits, dtype=mx.uint8)
    return digits.sum(-1).astype(mx.uint8)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (uint8, ..., columns) in MLX's packing: without a gap, the lowest bits first."""
    if bits == 8:
        return mx.contiguous(codes).view(mx.uint32)
    single = codes[..., None] >> mx.arange(bits, dtype=mx.uint8) & 1
    by_word = single.reshape(*codes.shape[:-1], -1, 32).astype(mx.uint32)
    return (by_word << mx.arange(32, dtype=mx.uint32)).sum(-1).astype(mx.uint32)


def affine_config(bits: int, columns: int, group: int) -> QuantConfig | None:
    """MLX's configuration for codes whose scales are shared by `group` columns; None without one.

    A group that MLX lacks falls into smaller ones that share a scale, 7 bits are taken as 8, and 1
    as 2.
    """
    bits = {1: 2, 7: 8}.get(bits, bits)
    if columns % group or bits not in AFFINE_BITS:
        return None
    sizes = [size for size in AFFINE_GROUPS if group % size == 0]
    return QuantConfig(bits, max(sizes)) if sizes else None


def affine_codes(
    words: mx.array, scales: mx.array, zeros: mx.array, config: QuantConfig, columns: int
) -> Codes:
    """Codes of values (code - zero) x scale, in MLX's affine form with a bias of -zero x scale.

    Args:
        words: uint32 (..., rows, words), in MLX's packing.
        scales: (..., rows, groups) of any float type.
        zeros: like the scales.
        config: whose groups divide those of the scales.
        columns: of the weight.
    """
    scales = scales.astype(mx.float32)
    biases = -scales * zeros
    repeats = columns // config.group_size // scales.shape[-1]
    if repeats > 1:
        scales = mx.repeat(scales, repeats, axis=-1)
        biases = mx.repeat(biases, repeats, axis=-1)
    return Codes(words, scales, biases)


def spread(numbers: mx.array, columns: int, group: int) -> mx.array:
    """Numbers (..., groups) repeated for each of their group's columns; the last may be cut off."""
    return mx.repeat(numbers, group, axis=-1)[..., :columns]
