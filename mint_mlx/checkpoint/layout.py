"""Bytes on disk: the tensors that a layer is written as, their sizes and places in the shards.

Everything follows from shapes and the plan alone, so that sizes are exact before a weight is read
and a layer can be written at its place in any order. An affine layer of n weights costs `n*bits/8 +
2*itemsize*n/group` bytes, the mx modes `n*bits/8 + n/group`; header entries are padded to a fixed
width, which makes the cost of a layer independent of all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from ..base.files import MTP_FILE
from ..base.quant_config import QuantConfig
from ..base.safetensors_header import ITEMSIZE

MAX_SHARD = 5 * 10**9  # bytes
OFFSET_DIGITS = 15  # every offset of a header is padded to this width
_ALIGN = 8
_OPENING = '{"__metadata__":{"format":"mlx"}'


def _pad(text: str) -> str:
    return text + " " * (-len(text.encode()) % _ALIGN)


SHARD_BYTES = 8 + len(_pad(_OPENING)) + _ALIGN  # header length, opening, closing brace


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as it will be written. `dtype` is a safetensors code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @cached_property
    def file_bytes(self) -> int:
        """Data and header entry together."""
        return self.nbytes + len(self.entry(0))

    def entry(self, start: int) -> bytes:
        """The tensor's header entry, of the same length wherever it lies."""
        shape = json.dumps(list(self.shape), separators=(",", ":"))
        begin, end = (f"{n:>{OFFSET_DIGITS}}" for n in (start, start + self.nbytes))
        text = (
            f',{json.dumps(self.name)}:{{"dtype":"{self.dtype}","shape":{shape},'
            f'"data_offsets":[{begin},{end}]}}'
        )
        return _pad(text).encode()


def weight_tensors(
    path: str, shape: Sequence[int], dtype: str, config: QuantConfig
) -> tuple[TensorSpec, ...]:
    """The tensors of one layer's weight of this (unquantized) shape under a configuration."""
    if not config.quantized:
        return (TensorSpec(f"{path}.weight", dtype, tuple(shape)),)
    *lead, last = shape
    packed = TensorSpec(f"{path}.weight", "U32", (*lead, last * config.bits // 32))
    groups = (*lead, last // config.group_size)
    if config.mode != "affine":
        whole = (TensorSpec(f"{path}.global_scale", "F32", tuple(shape[:1])),)
        scales = TensorSpec(f"{path}.scales", "U8", groups)
        return packed, scales, *(whole if config.global_scale else ())
    return (
        packed,
        TensorSpec(f"{path}.scales", dtype, groups),
        TensorSpec(f"{path}.biases", dtype, groups),
    )


@dataclass(frozen=True)
class Placed:
    """A tensor with its absolute position in a shard file."""

    spec: TensorSpec
    shard: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """All shards of a checkpoint: names, headers, sizes, and each tensor's place by name."""

    names: tuple[str, ...]
    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]
    tensors: Mapping[str, Placed]

    @property
    def total(self) -> int:
        return sum(self.sizes)


def make_layout(
    units: Iterable[Sequence[TensorSpec]],
    max_shard: int | None = None,
    beside: Iterable[Sequence[TensorSpec]] = (),
) -> Layout:
    """Place the tensors of modules into shards, in order.

    A module is never split; one that is larger than a shard gets a shard of its own. Within a shard
    the tensors with the widest items come first, so that every tensor is aligned.

    Args:
        units: the tensors of one module each.
        max_shard: bytes of a shard at most; MAX_SHARD by default.
        beside: the tensors of modules in a file of their own beside the model's shards.
    """
    limit = MAX_SHARD if max_shard is None else max_shard
    shards: list[list[TensorSpec]] = [[]]
    size = SHARD_BYTES
    for unit in units:
        cost = sum(spec.file_bytes for spec in unit)
        if shards[-1] and size + cost > limit:
            shards.append([])
            size = SHARD_BYTES
        shards[-1].extend(unit)
        size += cost

    # The names that mlx-lm and transformers expect.
    total = len(shards)
    names = ["model.safetensors"]
    if total > 1:
        names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    if extra := [spec for unit in beside for spec in unit]:
        shards.append(extra)
        names.append(MTP_FILE)

    headers = []
    sizes = []
    placed = {}
    for index, specs in enumerate(shards):
        specs.sort(key=lambda spec: -ITEMSIZE[spec.dtype])
        data = SHARD_BYTES + sum(len(spec.entry(0)) for spec in specs)
        text = _pad(_OPENING).encode()
        position = 0
        for spec in specs:
            text += spec.entry(position)
            placed[spec.name] = Placed(spec, index, data + position)
            position += spec.nbytes
        text += _pad("}").encode()
        headers.append(len(text).to_bytes(8, "little") + text)
        sizes.append(data + position)
    return Layout(tuple(names), tuple(headers), tuple(sizes), placed)
