"""Codes are packed as MLX reads them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_mlx.converters.quantizers.codes import pack


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_packed_codes_are_what_mlx_reads(bits: int, rows: int, groups: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * groups)).astype(np.uint8)
    ones = mx.ones((rows, groups))
    zeros = mx.zeros((rows, groups))
    read = mx.dequantize(mx.array(pack(codes, bits)), ones, zeros, 32, bits)
    np.testing.assert_array_equal(np.array(read), codes)
