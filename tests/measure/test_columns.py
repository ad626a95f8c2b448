"""Groups as columns and back, and codes in that form packed as MLX reads them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.converters.quantizers.codes import pack
from mint_mlx.measure.columns import (
    as_columns,
    as_rows,
    pack_columns,
    raw_rows,
    tiled,
)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_columns_hold_the_weights_of_their_groups(dtype: mx.Dtype) -> None:
    weight = mx.random.normal((2, 3, 128), key=mx.random.key(0)).astype(dtype)
    exact = np.array(weight.astype(mx.float32)).reshape(6, 128)
    columns = as_columns(raw_rows(weight), 64)
    assert columns.shape == (64, 12)
    np.testing.assert_array_equal(np.sort(columns[:, 3]), np.sort(exact[1, 64:]))
    np.testing.assert_array_equal(as_rows(columns, 128), exact)
    counts = np.arange(128, dtype=np.float32).reshape(2, 64)
    np.testing.assert_array_equal(as_rows(tiled(counts, 6), 128), np.tile(np.arange(128), (6, 1)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_codes_in_columns_are_packed_as_those_in_rows(bits: int, group: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 256))
    columns = as_columns(codes.astype(np.float32), group)
    words = pack_columns(columns, bits).reshape(5, -1)
    np.testing.assert_array_equal(words, pack(codes.astype(np.uint8), bits))
