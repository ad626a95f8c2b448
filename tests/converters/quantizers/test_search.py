"""Searched ranges lose less than MLX's own, and rows are as large as they were."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_mlx.base.quant_config import QuantConfig, mx_mode
from mint_mlx.converters.quantizers import gptq, rtn, search
from mint_mlx.converters.quantizers.codes import Codes


def random(*shape: int, seed: int = 1) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * 0.05).astype(mx.bfloat16)


def restored(packed: dict[str, mx.array], config: QuantConfig) -> np.ndarray:
    weight = mx.dequantize(
        packed["weight"],
        packed["scales"],
        packed["biases"],
        group_size=config.group_size,
        bits=config.bits,
    )
    return np.array(weight.astype(mx.float32), dtype=np.float64)


def searched(
    weight: mx.array,
    config: QuantConfig,
    importance: np.ndarray | None = None,
) -> dict[str, mx.array]:
    """What a search alone gives, before rows are made as large as they were."""
    exact = np.array(weight.astype(mx.float32)).reshape(-1, weight.shape[-1])
    codes, *numbers = search.find_grid(exact, config, weight.dtype, importance)
    shape = (*weight.shape[:-1], -1)
    stored = (mx.array(array).reshape(shape).astype(weight.dtype) for array in numbers)
    return Codes(config, codes.reshape(weight.shape), *stored).packed()


def as_numbers(weight: mx.array) -> np.ndarray:
    return np.array(weight.astype(mx.float32), dtype=np.float64)


@pytest.mark.parametrize(("bits", "group", "most"), [(2, 64, 0.72), (3, 32, 0.78), (4, 64, 0.88)])
def test_searched_grids_lose_less(bits: int, group: int, most: float) -> None:
    weight, config = random(2, 48, 256), QuantConfig(bits, group)
    exact = as_numbers(weight)
    errors = [
        np.square(restored(packed, config) - exact).sum()
        for packed in (searched(weight, config), rtn.quantize(weight, config))
    ]
    assert errors[0] < most * errors[1]


def test_no_group_loses_much_more_than_by_rounding() -> None:
    weight, config = random(64, 128), QuantConfig(4, 32)
    exact = as_numbers(weight)
    best, nearest = (
        np.square(restored(packed, config) - exact).reshape(-1, 32).sum(axis=1)
        for packed in (searched(weight, config), rtn.quantize(weight, config))
    )
    # (Scales, biases and what `mx.dequantize` gives are rounded to 16 bits.)
    assert (best <= 1.06 * nearest).all()


def test_columns_that_count_more_lose_less() -> None:
    weight, config = random(1, 32, 64), QuantConfig(2, 32)
    importance = np.ones(64, dtype=np.float32)
    importance[::2] = 25
    errors = [
        np.square(restored(searched(weight, config, counts), config) - as_numbers(weight))[
            ..., ::2
        ].sum()
        for counts in (importance, None)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_each_row_is_as_large_as_it_was() -> None:
    weight, config = random(2, 16, 256), QuantConfig(2, 64)
    exact = as_numbers(weight)

    def shrinkage(packed: dict[str, mx.array]) -> np.ndarray:
        product = (restored(packed, config) * exact).sum(axis=-1)
        return 1 - product / np.square(exact).sum(axis=-1)

    assert (shrinkage(searched(weight, config)) > 0.03).all()
    stretched = search.quantize(weight, config)
    np.testing.assert_allclose(shrinkage(stretched), 0, atol=4e-3)

    fine = QuantConfig(4, 64)
    codes = [packed(weight, fine)["weight"] for packed in (search.quantize, searched)]
    assert mx.array_equal(*codes)


def test_large_weights_of_few_bits_are_clipped_less() -> None:
    """A huge input may meet them, which weights don't show."""
    weight, config = random(64, 256), QuantConfig(3, 64)
    exact = as_numbers(weight).reshape(-1, 64)
    largest = np.abs(exact).argmax(axis=1)[:, None]
    errors = []
    for packed in (search.quantize(weight, config), searched(weight, config)):
        error = restored(packed, config).reshape(-1, 64) - exact
        errors.append(np.square(np.take_along_axis(error, largest, axis=1)).mean())
    assert errors[0] < 0.7 * errors[1]


def test_rows_are_stretched_as_their_inputs_see_them() -> None:
    weight, config = random(1, 16, 128), QuantConfig(2, 32)
    inputs = np.random.default_rng(2).normal(size=(512, 128)) * np.linspace(0.2, 2, 128)
    moment = (inputs.T @ inputs).astype(np.float32)
    packed = gptq.quantize(weight, config, moment[None], searched=True)
    exact = as_numbers(weight)[0]
    energy = ((exact @ moment) * exact).sum(axis=-1)
    product = ((exact @ moment) * restored(packed, config)[0]).sum(axis=-1)
    np.testing.assert_allclose(product / energy, 1, atol=5e-3)

    # Error feedback on searched grids costs less than on those of `mx.quantize`.
    costs = []
    for ranges in (True, False):
        packed = gptq.quantize(weight, config, moment[None], ranges)
        error = restored(packed, config)[0] - exact
        costs.append(((error @ moment) * error).sum())
    assert costs[0] < 0.9 * costs[1]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from((2, 4, 8)))
@settings(max_examples=8, deadline=None)
def test_a_piece_of_rows_has_the_codes_of_the_whole(first: int, rest: int, bits: int) -> None:
    weight, config = random(first + rest, 64), QuantConfig(bits, 32)
    whole = search.quantize(weight, config)
    pieces = [search.quantize(piece, config) for piece in (weight[:first], weight[first:])]
    for name, array in whole.items():
        assert mx.array_equal(array, mx.concatenate([piece[name] for piece in pieces]))


def test_constant_and_empty_rows_stay_as_they_are() -> None:
    weight = mx.concatenate([mx.zeros((4, 64)), mx.full((4, 64), 0.25)]).astype(mx.bfloat16)
    config = QuantConfig(3, 64)
    np.testing.assert_array_equal(
        restored(search.quantize(weight, config), config), as_numbers(weight)
    )


def test_modes_without_biases_are_rounded() -> None:
    weight, config = random(8, 64), mx_mode("mxfp4")
    packed = search.quantize(weight, config)
    for name, array in rtn.quantize(weight, config).items():
        assert mx.array_equal(packed[name], array)


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_codes_do_not_depend_on_how_large_weights_are(factor: float) -> None:
    weight, config = random(8, 64), QuantConfig(3, 32)
    codes, scaled = (search.quantize(w, config) for w in (weight, weight * factor))
    assert mx.array_equal(codes["weight"], scaled["weight"])
    assert mx.array_equal(codes["scales"] * factor, scaled["scales"])
