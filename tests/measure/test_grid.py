"""Weights on a grid are found, with their exact codes, and no others are."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.base.quant_config import QuantConfig, parse_config
from mint_mlx.measure.grid import describe, find_grids_of, grid_for
from mint_mlx.measure.grid_fit import fit, grid_errors, nearest_errors

GRIDS = ("2bit-g32", "3bit-g64", "4bit-g32", "4bit-g64", "4bit-g128", "5bit-g64", "6bit-g32")


def random(rows: int = 96, columns: int = 256, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return (mx.random.normal((rows, columns), key=mx.random.key(7)) * 0.05).astype(dtype)


def restored(weight: mx.array, config: QuantConfig) -> mx.array:
    """What a 16-bit copy of a checkpoint of MLX's own holds."""
    packed = mx.quantize(weight, config.group_size, config.bits, mode=config.mode)
    return mx.dequantize(
        *packed, group_size=config.group_size, bits=config.bits, mode=config.mode
    ).astype(weight.dtype)


def int8_rows(columns: int = 256) -> mx.array:
    """Codes of 8 bits with one scale for all of them, a power of two."""
    codes = np.random.default_rng(3).integers(-127, 128, (64, columns))
    return mx.array(codes / 1024).astype(mx.bfloat16)


def ternary(columns: int = 256) -> mx.array:
    """Rows of -g, 0 and g, with another g each, as TriLM's."""
    rng = np.random.default_rng(1)
    scale = mx.array(rng.uniform(0.01, 0.1, (64, 1))).astype(mx.bfloat16)
    return mx.array(rng.integers(-1, 2, (64, columns))).astype(mx.bfloat16) * scale


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_random_weights_are_on_no_grid(dtype: mx.Dtype) -> None:
    assert find_grids_of(random(dtype=dtype)) == ()
    assert find_grids_of(random(4, 32, dtype)) == ()
    assert find_grids_of(random(4, 48, dtype)) == ()  # groups of 32 don't divide these rows


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_weights_of_one_value_tell_nothing(value: float) -> None:
    assert find_grids_of(mx.full((8, 64), value, dtype=mx.bfloat16)) == ()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", GRIDS)
def test_a_copy_of_mlx_s_own_comes_back_exactly(name: str, dtype: mx.Dtype) -> None:
    config = parse_config(name)
    copy = restored(random(dtype=dtype), config)
    grids = find_grids_of(copy)
    assert grid_for(grids, config) == config
    errors, energy = grid_errors(copy[None], grids, [config])
    assert errors.sum() <= 2e-6 * energy.sum()
    if config.bits < 6:
        assert errors.sum() == 0


def test_ternary_weights_are_exact_in_two_bits() -> None:
    weight = ternary()
    grids = find_grids_of(weight)
    assert grids == (QuantConfig(2, 128),)
    fitted = fit(weight, grids[0])
    assert (fitted.error == 0).all()
    assert nearest_errors(weight, QuantConfig(2, 128), 128).sum() > 0.05 * float(
        mx.sum(mx.square(weight.astype(mx.float32)))
    )

    # Its scale is g and its bias -g, where a group holds all three values.
    assert fitted.biases is not None
    largest = np.abs(np.array(weight.astype(mx.float32))).reshape(-1, 128).max(axis=1)
    np.testing.assert_array_equal(np.abs(fitted.scales), largest)
    np.testing.assert_array_equal(fitted.biases, -fitted.scales)


def test_whole_rows_of_int8_are_found() -> None:
    grids = find_grids_of(int8_rows())
    assert grids == (QuantConfig(8, 128),)
    assert describe(grids[0]) == "on an 8-bit grid of 128"
    errors, energy = grid_errors(int8_rows()[None], grids, [QuantConfig(8, 64)])
    assert errors.sum() <= 1e-5 * energy.sum()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_mx_modes_are_found_by_their_own_values(name: str) -> None:
    config = parse_config(name)
    copy = restored(random(), config)
    grids = find_grids_of(copy)
    assert grid_for(grids, config) == config
    assert (fit(copy, config).error == 0).all()


def test_mxfp4_is_exact_where_mlx_takes_another_exponent() -> None:
    values = np.random.default_rng(0).choice([0, 0.5, 1, -1.5, 2, -3, 4], (64, 256))
    weight = mx.array(values).astype(mx.bfloat16)
    config = parse_config("mxfp4")
    assert config in find_grids_of(weight)
    assert (fit(weight, config).error == 0).all()


def test_the_grid_of_a_few_bits_is_stored_in_more_and_in_smaller_groups() -> None:
    grids = find_grids_of(restored(random(), parse_config("4bit-g64")))
    assert grids == (parse_config("4bit-g64"),)
    assert describe(grids[0]) == "on a 4-bit grid of 64"
    for name in ("4bit-g64", "4bit-g32", "8bit-g64"):
        assert grid_for(grids, parse_config(name)) == grids[0]
    for name in ("3bit-g64", "4bit-g128", "mxfp4"):
        assert grid_for(grids, parse_config(name)) is None


def test_a_layer_of_which_a_part_is_off_the_grid_is_not_on_it() -> None:
    copy = restored(random(), parse_config("4bit-g32"))
    copy[::4] = random()[::4]
    assert find_grids_of(copy) == ()


@pytest.mark.parametrize("expert", [0, 1])
def test_an_expert_that_is_zero_does_not_hide_a_grid(expert: int) -> None:
    copy = restored(random(), parse_config("4bit-g32")).reshape(3, 32, 256)
    copy[expert] = 0
    assert find_grids_of(copy) == (parse_config("4bit-g32"),)
