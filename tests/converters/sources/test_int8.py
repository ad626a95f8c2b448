"""Signed bytes of compressed-tensors, torchao and bitsandbytes, and its tables of four bits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from formulas import e4m3
from quantized import Arrays, matched, read

from mint_mlx.converters.sources import bitsandbytes, int8, torchao
from mint_mlx.converters.sources.packed import Unread

RNG = np.random.default_rng(6)


def signed(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scales", [(1,), (24,), (24, 1), (24, 4)])
@pytest.mark.parametrize(("form", "codes"), [(int8, ""), (torchao, "qdata")])
def test_int8_is_code_less_zero_times_scale(
    form: Any, codes: str, scales: tuple[int, ...], zeros: bool
) -> None:
    values, numbers = signed(24, 64), RNG.random(scales).astype(np.float32)
    zero = signed(*scales) if zeros else np.zeros(scales, np.int8)
    arrays: Arrays = {codes: ("I8", values), "scale": ("F32", numbers)}
    if zeros:
        arrays["zero_point"] = ("I8", zero)
    weight, got = read(form, arrays)
    assert weight.config is None

    def wide(n: np.ndarray) -> np.ndarray:
        n = n.astype(np.float32)
        return n if n.size == 1 else np.repeat(n.reshape(24, -1), 64 // n[0].size, 1)

    np.testing.assert_allclose(got, (values - wide(zero)) * wide(numbers), rtol=1e-6)


def test_int8_in_the_blocks_that_config_states() -> None:
    scales = RNG.random((2, 2)).astype(np.float32)
    values = signed(200, 256)
    scheme = {"weights": {"block_structure": [128, 128], "type": "int", "num_bits": 8}}
    arrays: Arrays = {"": ("I8", values), "scale": ("F32", scales)}
    _, got = read(int8, arrays, config_groups={"group_0": scheme})
    wide = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:200]
    np.testing.assert_allclose(got, values * wide, rtol=1e-6)


def test_torchao_float8() -> None:
    codes = RNG.integers(0, 126, (24, 64)).astype(np.uint8)
    scales = RNG.random((24, 1)).astype(np.float32)
    weight, got = read(torchao, {"qdata": ("F8_E4M3", codes), "scale": ("F32", scales)})
    assert weight.form == "torchao FP8 with one scale a row"
    np.testing.assert_allclose(got, e4m3(codes) * scales, rtol=1e-6)


def test_torchao_of_four_bits_is_refused() -> None:
    arrays: Arrays = {"qdata": ("I32", np.zeros((4, 4))), "scale": ("F32", np.zeros((4, 1)))}
    with pytest.raises(Unread, match="packed by torchao as I32"):
        matched(torchao, arrays)


@pytest.mark.parametrize(
    ("code", "scale", "shape", "reason"),
    [
        ("F8_E4M3", "F8_E8M0", (8, 2), "is MXFP8 of torchao"),
        ("U8", "F8_E8M0", (8, 2), "is MXFP4 of torchao"),
        ("U8", "F8_E4M3", (8, 4), "is NVFP4 of torchao"),
        ("I8", "F32", (2, 8), "is int4 of torchao"),
    ],
)
def test_other_types_of_torchao_are_named(
    code: str, scale: str, shape: tuple[int, ...], reason: str
) -> None:
    codes = np.zeros((8, 64), np.int8 if code == "I8" else np.uint8)
    scales = np.ones(shape, np.float32 if scale == "F32" else np.uint8)
    with pytest.raises(Unread, match=reason):
        matched(torchao, {"qdata": (code, codes), "scale": (scale, scales)})


def test_scales_of_activations_are_not_needed_but_those_of_smoothing_are() -> None:
    arrays, expected = tensors_of_torchao()
    static = arrays | {"act_quant_scale": ("F32", np.ones((1, 1), np.float32))}
    np.testing.assert_allclose(read(torchao, static)[1], expected)
    smoothed = arrays | {"act_pre_scale": ("F32", np.ones(64, np.float32))}
    with pytest.raises(Unread, match="was smoothed by torchao"):
        matched(torchao, smoothed)


def tensors_of_torchao() -> tuple[Arrays, np.ndarray]:
    """Signed bytes with a scale a row, and their values."""
    codes = np.arange(-128, 128, dtype=np.int8).reshape(4, 64)
    scales = np.array([[0.5], [1], [2], [4]], np.float32)
    return {"qdata": ("I8", codes), "scale": ("F32", scales)}, codes * scales


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": ("F32", np.ones((5, 1), np.float32))}, "its scales are of shape"),
        ({"zero_point": ("I8", np.ones((24, 4), np.int8))}, "zero points of another shape"),
        ({"global_scale": ("F32", np.ones(1, np.float32))}, "doesn't have"),
    ],
)
def test_int8_that_does_not_fit_is_refused(change: Arrays, reason: str) -> None:
    arrays: Arrays = {"": ("I8", signed(24, 64)), "scale": ("F32", np.ones((24, 1), np.float32))}
    with pytest.raises(Unread, match=reason):
        matched(int8, arrays | change)


def test_llm_int8_is_code_times_largest_of_the_row() -> None:
    values, largest = signed(24, 64), RNG.random(24).astype(np.float32)
    arrays: Arrays = {
        "": ("I8", values),
        "SCB": ("F32", largest),
        "weight_format": ("U8", np.zeros((), np.uint8)),
    }
    _, got = read(bitsandbytes, arrays)
    np.testing.assert_allclose(got, values * largest[:, None] / 127, rtol=1e-6)
    arrays["weight_format"] = ("U8", np.array(2, np.uint8))
    with pytest.raises(Unread, match="only a GPU kernel"):
        matched(bitsandbytes, arrays)


def four_bits(rows: int, columns: int, block: int, nested: bool) -> tuple[Arrays, np.ndarray]:
    """A weight's tensors as bitsandbytes packs it, and its values."""
    size = rows * columns
    blocks = -(-size // block)
    table, codes = RNG.standard_normal(16).astype(np.float32), RNG.integers(0, 16, size)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "shape": [rows, columns]}
    arrays: Arrays = {
        "": ("U8", (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]),
        "quant_map": ("F32", table),
    }
    largest = RNG.random(blocks).astype(np.float32)
    if nested:
        eight, code = RNG.standard_normal(256).astype(np.float32), RNG.integers(0, 256, blocks)
        outer = RNG.random(-(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_offset": 0.75}
        largest = eight[code] * np.repeat(outer, 256)[:blocks] + np.float32(0.75)
        arrays["absmax"] = ("U8", code.astype(np.uint8))
        arrays["nested_absmax"] = ("F32", outer)
        arrays["nested_quant_map"] = ("F32", eight)
    else:
        arrays["absmax"] = ("F32", largest)
    arrays["quant_state"] = ("U8", np.frombuffer(json.dumps(state).encode(), np.uint8))
    values = table[codes] * np.repeat(largest, block)[:size]
    return arrays, values.reshape(rows, columns)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (7, 40)])
def test_four_bits_of_bitsandbytes(rows: int, columns: int, nested: bool) -> None:
    arrays, expected = four_bits(rows, columns, 64, nested)
    weight, got = read(bitsandbytes, arrays)
    assert weight.form == f"bitsandbytes NF4{', doubly quantized' if nested else ''}"
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_codes_that_are_stored_as_floats() -> None:
    arrays, expected = four_bits(128, 256, 64, False)
    packed = arrays[""][1].reshape(-1, 2).view(np.float16)
    _, got = read(bitsandbytes, arrays | {"": ("F16", packed)})
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_damaged_states_are_refused() -> None:
    arrays, _ = four_bits(128, 256, 64, False)
    with pytest.raises(Unread, match="inside the weights") as elsewhere:
        matched(bitsandbytes, arrays, local=False)
    assert elsewhere.value.needs_weights
    assert elsewhere.value.instead == "download the checkpoint, and give its folder"
    state = np.frombuffer(b"{}", np.uint8)
    with pytest.raises(Unread, match="damaged"):
        matched(bitsandbytes, arrays | {"quant_state": ("U8", state)})
    state = np.frombuffer(b'{"shape": [128, 255], "blocksize": 64}', np.uint8)
    with pytest.raises(Unread, match="which its bytes are not"):
        matched(bitsandbytes, arrays | {"quant_state": ("U8", state)})
    del arrays["quant_map"]
    with pytest.raises(Unread, match="missing"):
        matched(bitsandbytes, arrays)
