"""Bytes are exact: known before a weight is read, and valid safetensors for every reader."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mint_mlx.base.quant_config import KEEP, MX_MODES, QuantConfig, affine, mx_mode
from mint_mlx.checkpoint.layout import SHARD_BYTES, TensorSpec, make_layout, weight_tensors

SHAPE = (3, 8, 256)


@pytest.mark.parametrize("config", [*affine(), *(mx_mode(m) for m in MX_MODES)], ids=str)
def test_tensors_are_those_of_mx_quantize(config: QuantConfig) -> None:
    packed = mx.quantize(
        mx.zeros(SHAPE, mx.bfloat16), config.group_size, config.bits, mode=config.mode
    )
    specs = weight_tensors("a", SHAPE, "BF16", config)
    assert [s.shape for s in specs] == [tuple(p.shape) for p in packed]
    assert [s.nbytes for s in specs] == [p.nbytes for p in packed]
    n = 3 * 8 * 256
    itemsize = 2
    scales = (
        2 * itemsize * n // config.group_size if config.mode == "affine" else n // config.group_size
    )
    assert sum(s.nbytes for s in specs) == n * config.bits // 8 + scales


def test_keep_is_the_weight_itself() -> None:
    assert weight_tensors("a", SHAPE, "BF16", KEEP) == (TensorSpec("a.weight", "BF16", SHAPE),)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
specs = st.builds(
    TensorSpec,
    names,
    st.sampled_from(["U32", "BF16", "F32", "U8"]),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
)


@given(st.lists(specs, min_size=1, max_size=12, unique_by=lambda s: s.name), st.integers(200, 1200))
def test_the_size_is_the_sum_of_the_tensors(tensors: list[TensorSpec], max_shard: int) -> None:
    layout = make_layout([[spec] for spec in tensors], max_shard)
    assert layout.total == sum(s.file_bytes for s in tensors) + SHARD_BYTES * len(layout.names)
    largest = max(s.file_bytes for s in tensors)
    for size, header in zip(layout.sizes, layout.headers, strict=True):
        assert size <= max(max_shard, SHARD_BYTES + largest)
        (length,) = struct.unpack("<Q", header[:8])
        assert length + 8 == len(header)
        assert len(header) % 8 == 0
        json.loads(header[8:])


@given(st.lists(specs, min_size=1, max_size=8, unique_by=lambda s: s.name))
def test_other_readers_open_the_files(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[TensorSpec]
) -> None:
    if any(s.name == "__metadata__" for s in tensors):
        return
    folder: Path = tmp_path_factory.mktemp("layout")
    layout = make_layout([tensors])
    path = folder / layout.names[0]
    path.write_bytes(layout.headers[0] + bytes(layout.sizes[0] - len(layout.headers[0])))
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {s.name for s in tensors}
        assert all(tuple(file.get_slice(spec.name).get_shape()) == spec.shape for spec in tensors)
    for spec in tensors:
        place = layout.tensors[spec.name]
        assert place.offset % {"U32": 4, "F32": 4, "BF16": 2, "U8": 1}[spec.dtype] == 0
