"""Packed integers of compressed-tensors: (code - zero) x scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from quantized import Arrays, bit_stream, matched, padded, read

from mint_mlx.converters.sources import pack_quantized
from mint_mlx.converters.sources.packed import Unread

RNG = np.random.default_rng(3)


def scheme(bits: int, group: int | None, **more: Any) -> dict[str, Any]:
    """A `quantization_config` of one group."""
    strategy = "group" if group else "channel"
    weights = {"num_bits": bits, "type": "int", "group_size": group, "strategy": strategy} | more
    return {"config_groups": {"group_0": {"weights": weights}}}


def packed(
    bits: int, rows: int, columns: int, groups: int, older: bool = False, zeros: bool = False
) -> tuple[Arrays, np.ndarray]:
    """A weight's tensors, and its values."""
    into_words = padded if older else bit_stream
    codes = RNG.integers(0, 2**bits, (rows, columns))
    scales = RNG.random((rows, groups)).astype(np.float32)
    zero = (
        RNG.integers(0, 2**bits, (rows, groups)) if zeros else np.full((rows, 1), 2 ** (bits - 1))
    )
    arrays: Arrays = {
        "packed": ("I32", into_words(codes, bits)),
        "scale": ("F32", scales),
        "shape": ("I64", np.array([rows, columns])),
    }
    if zeros:
        arrays["zero_point"] = ("I32", into_words(zero.T, bits).T)
    wide = [np.repeat(n, -(-columns // n.shape[1]), 1)[:, :columns] for n in (zero, scales)]
    return arrays, (codes - wide[0]) * wide[1]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_every_width_stays(bits: int, zeros: bool, older: bool) -> None:
    arrays, expected = packed(bits, 40, 192, 3, older, zeros)
    weight, values = read(pack_quantized, arrays, **scheme(bits, 64))
    assert str(weight.config) == f"{ {1: 2, 7: 8}.get(bits, bits) }bit-g64"
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("columns", "group", "config"),
    [
        (384, None, "4bit-g128"),
        (192, None, "4bit-g64"),
        (512, 256, "4bit-g128"),
        (96, None, "4bit-g32"),
        (192, 96, "4bit-g32"),
        (64, 128, "4bit-g64"),
        (96, 16, "None"),
        (200, 128, "None"),
        (40, None, "None"),
    ],
)
def test_groups_that_mlx_lacks_fall_into_smaller_ones(
    columns: int, group: int | None, config: str
) -> None:
    codes = RNG.integers(0, 16, (8, columns))
    groups = -(-columns // group) if group else 1
    scales = RNG.random((8, groups)).astype(np.float32)
    arrays: Arrays = {
        "packed": ("I32", bit_stream(codes, 4)),
        "scale": ("F32", scales),
        "shape": ("I64", np.array([8, columns])),
    }
    weight, values = read(pack_quantized, arrays, **scheme(4, group))
    assert str(weight.config) == config
    wide = np.repeat(scales, group or columns, 1)[:, :columns]
    np.testing.assert_allclose(values, (codes - 8) * wide, rtol=2e-6, atol=1e-5)


def test_one_scale_for_the_whole_tensor() -> None:
    codes = RNG.integers(0, 256, (8, 64))
    arrays: Arrays = {
        "packed": ("I32", bit_stream(codes, 8)),
        "scale": ("F32", np.array([0.5], dtype=np.float32)),
        "shape": ("I64", np.array([8, 64])),
    }
    _, values = read(pack_quantized, arrays, **scheme(8, None))
    np.testing.assert_allclose(values, (codes - 128) * 0.5)


def test_zero_points_that_are_not_packed() -> None:
    arrays, _ = packed(4, 8, 128, 2)
    zeros = RNG.integers(-8, 8, (8, 2)).astype(np.int8)
    with_zeros = arrays | {"zero_point": ("I8", zeros)}
    scales = np.repeat(arrays["scale"][1], 64, 1)
    _, plain = read(pack_quantized, arrays, **scheme(4, 64))
    _, values = read(pack_quantized, with_zeros, **scheme(4, 64))
    np.testing.assert_allclose(values, plain - np.repeat(zeros, 64, 1) * scales, atol=1e-5)


@pytest.mark.parametrize(("actorder", "stays"), [("static", True), ("weight", True), ("group", 0)])
def test_reordered_columns_are_dequantized(actorder: str, stays: bool) -> None:
    arrays, expected = packed(4, 8, 128, 4)
    codes_scale = np.repeat(arrays["scale"][1], 32, 1)
    order = np.repeat(np.arange(4), 32).astype(np.int32)
    if not stays:
        order = RNG.permutation(order)
        scales = arrays["scale"][1][:, order]
        expected = expected / codes_scale * scales
        arrays["g_idx"] = ("I32", order)
    weight, values = read(pack_quantized, arrays, **scheme(4, 32, actorder=actorder))
    assert (weight.config is not None) == bool(stays)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unset", [128, 3])
def test_an_order_that_was_never_set_is_none(unset: int) -> None:
    """compressed-tensors begins with -1, and takes an index that holds one for no index."""
    arrays, expected = packed(4, 8, 128, 4)
    order = RNG.permutation(np.repeat(np.arange(4), 32)).astype(np.int32)
    order[:unset] = -1
    arrays["g_idx"] = ("I32", order)
    weight, values = read(pack_quantized, arrays, **scheme(4, 32, actorder="group"))
    assert str(weight.config) == "4bit-g32"
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-5)


def test_the_scheme_is_found_where_the_numbers_are_elsewhere() -> None:
    arrays, _ = packed(3, 8, 192, 3, older=True)
    weight = matched(pack_quantized, arrays, local=False, **scheme(3, 64))
    assert weight is not None
    assert weight.shape == (8, 192)


def test_of_several_schemes_the_one_that_fits_is_taken() -> None:
    arrays, expected = packed(8, 8, 256, 2)
    groups = {
        "a": scheme(4, 32)["config_groups"]["group_0"],
        "b": scheme(8, 128)["config_groups"]["group_0"],
        "c": {"weights": {"num_bits": 8, "type": "float", "group_size": None}},
    }
    weight, values = read(pack_quantized, arrays, config_groups=groups)
    assert str(weight.config) == "8bit-g128"
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"packed": ("I32", np.zeros((8, 9), np.int32))}, "9 words a row"),
        ({"scale": ("F32", np.ones((8, 5), np.float32))}, "4 bits in groups of 64"),
        ({"zero_point": ("I32", np.zeros((3, 2), np.int32))}, "zero points of shape"),
        ({"global_scale": ("F32", np.ones(1, np.float32))}, "doesn't have"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: Arrays, reason: str) -> None:
    arrays, _ = packed(4, 8, 128, 2)
    with pytest.raises(Unread, match=reason):
        matched(pack_quantized, arrays | change, **scheme(4, 64))


def blocks(rows: int, columns: int) -> dict[str, Any]:
    """A `quantization_config` of 4 bits with one scale a block."""
    shape = {"strategy": "block", "block_structure": [rows, columns]}
    return {"quant_method": "compressed-tensors"} | scheme(4, None, **shape)


@pytest.mark.parametrize("zeros", [False, True])
def test_blocks_of_rows_and_columns(zeros: bool) -> None:
    codes = RNG.integers(0, 16, (40, 192))
    scales = RNG.random((2, 3)).astype(np.float32)
    zero = RNG.integers(0, 16, (2, 3)) if zeros else np.full((2, 3), 8)
    arrays: Arrays = {"packed": ("I32", bit_stream(codes, 4)), "scale": ("F32", scales)}
    arrays["shape"] = ("I64", np.array([40, 192]))
    if zeros:
        arrays["zero_point"] = ("I32", bit_stream(zero.T, 4).T)
    weight, values = read(pack_quantized, arrays, **blocks(32, 64))
    assert str(weight.config) == "4bit-g64"
    assert "block of 32x64" in weight.form
    wide = [np.repeat(np.repeat(n, 32, 0)[:40], 64, 1) for n in (zero, scales)]
    np.testing.assert_allclose(values, (codes - wide[0]) * wide[1], rtol=2e-6, atol=1e-5)


def test_blocks_that_do_not_fit_are_refused_as_that() -> None:
    arrays, _ = packed(4, 8, 128, 2)
    arrays["scale"] = ("F32", np.ones((2, 2), np.float32))
    with pytest.raises(Unread, match="not that of 4 bits in blocks of 64x64"):
        matched(pack_quantized, arrays, **blocks(64, 64))


def seven_and_eight(**more: Any) -> dict[str, Any]:
    """A `quantization_config` of 7 bits for some layers, and of 8 for `layer`."""
    seven, eight = (scheme(bits, 64)["config_groups"]["group_0"] for bits in (7, 8))
    return {"config_groups": {"a": seven, "b": eight | more}}


def test_eight_bits_are_told_from_seven_that_leave_gaps_by_the_layers_of_a_scheme() -> None:
    arrays, expected = packed(8, 8, 192, 3)
    for target in ("layer", "re:.*ay"):
        _, values = read(pack_quantized, arrays, **seven_and_eight(targets=[target]))
        np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("version", ["0.18.0", "0.20.1", "1.0.0"])
def test_or_by_the_version_that_leaves_no_gaps(version: str) -> None:
    arrays, expected = packed(8, 8, 192, 3)
    stated = seven_and_eight(targets=["Linear"]) | {"version": version}
    _, values = read(pack_quantized, arrays, **stated)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("version", ["0.17.1", None])
def test_else_they_are_refused(version: str | None) -> None:
    arrays, _ = packed(8, 8, 192, 3)
    stated = seven_and_eight(targets=["re:(", 3]) | {"version": version}
    with pytest.raises(Unread, match="may hold 7 bits in groups of 64 as well as 8 bits"):
        matched(pack_quantized, arrays, **stated)
