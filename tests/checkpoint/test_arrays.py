"""Weights that are not finite are named; an array's memory is seen as it is."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, llama, spoil_weight

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.arrays import flat_view
from mint_mlx.jobs.convert import convert


@pytest.mark.parametrize("how", [{"budget": "5bpw"}, {"uniform": "4bit-g64"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    make: Maker, tmp_path: Path, how: dict[str, str], value: float
) -> None:
    folder = make(llama(1))
    name = "model.layers.0.self_attn.q_proj.weight"
    spoil_weight(folder, name, value)
    with pytest.raises(MintError, match=name):
        convert(str(folder), out=tmp_path / "out", smoke=False, **how)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32, mx.uint32], ids=str)
def test_memory_is_seen_in_the_order_of_the_numbers(dtype: mx.Dtype) -> None:
    array = mx.arange(1, 25).reshape(2, 3, 4).astype(dtype)
    for part in (array, array[:, 1:], array[..., ::2], array.transpose(2, 0, 1), array[0, 0, 0]):
        raw = np.uint16 if dtype.size == 2 else np.uint32
        again = mx.array(flat_view(part, raw)).view(dtype).reshape(part.shape)
        assert mx.array_equal(again, part)
    assert flat_view(array[:0], np.uint8).size == 0
