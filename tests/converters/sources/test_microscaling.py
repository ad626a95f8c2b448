"""MXFP4, MXFP8 and NVFP4: codes times the scale of their group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from formulas import E2M1, e4m3
from quantized import Arrays, bit_stream, matched, read

from mint_mlx.base.safetensors_header import TensorInfo
from mint_mlx.converters.sources import fp8, microscaling, nvfp4
from mint_mlx.converters.sources.packed import Unread, group_tensors

RNG = np.random.default_rng(4)
NVFP4_ENDS = ("", "_weight_scale", "_weight_scale_2")
LEADS = [(8,), (3, 8)]  # rows, and experts with rows


def four_bits(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of two E2M1 codes, and their values: the low bits come first."""
    packed = RNG.integers(0, 256, shape).astype(np.uint8)
    values = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], axis=-1)
    return packed, values.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("role", "code"), [("packed", "U8"), ("", "U8"), ("", "I8")])
@pytest.mark.parametrize("scale", ["U8", "F8_E8M0"])
def test_mxfp4_stays(lead: tuple[int, ...], role: str, code: str, scale: str) -> None:
    packed, values = four_bits(*lead, 48)
    byte = RNG.integers(110, 140, (*lead, 3)).astype(np.uint8)
    arrays: Arrays = {role: (code, packed.view(np.int8 if code == "I8" else np.uint8))}
    arrays["scale"] = (scale, byte)
    weight, got = read(microscaling, arrays)
    assert str(weight.config) == "mxfp4"
    sizes = np.repeat(2.0 ** (byte.astype(np.float32) - 127), 32, -1)
    np.testing.assert_array_equal(got, values * sizes)


@pytest.mark.parametrize("lead", LEADS)
def test_mxfp6_is_whole_eighths(lead: tuple[int, ...]) -> None:
    """As compressed-tensors 0.20.1 writes it: E2M3, four codes in three bytes."""
    codes = RNG.integers(0, 64, (*lead, 96))
    size = codes & 7 | np.where(codes & 24, 8, 0)  # the mantissa in eighths, with its leading one
    exponent = np.maximum((codes >> 3 & 3) - 1, 0)
    values = np.where(codes & 32, -1, 1) * size * 2.0**exponent / 8
    byte = RNG.integers(110, 140, (*lead, 3)).astype(np.uint8)
    words = bit_stream(codes.reshape(-1, 96), 6).view(np.uint8).reshape(*lead, 72)
    arrays: Arrays = {"packed": ("U8", words), "scale": ("U8", byte)}
    scheme = {"weights": {"num_bits": 6, "type": "float", "group_size": 32}}
    weight, got = read(microscaling, arrays, config_groups={"g": scheme})
    assert (weight.form, str(weight.config)) == ("MXFP6", "8bit-g32")
    np.testing.assert_array_equal(
        got, values * np.repeat(2.0 ** (byte.astype(float) - 127), 32, -1)
    )
    assert matched(microscaling, arrays) is None  # other tools have another six bits


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(
    "table",
    [
        {"data_type": "mx_int"},
        {"data_type": "mx_fp", "extra_config": {"layer": {"data_type": "mx_int"}}},
    ],
)
def test_integers_with_shared_exponents_are_a_sign_and_quarters(
    lead: tuple[int, ...], table: dict[str, Any]
) -> None:
    """As AutoRound 0.16.1 writes `MXINT4`: the tensors of MXFP4, and a word in the config."""
    packed = RNG.integers(0, 256, (*lead, 48)).astype(np.uint8)
    byte = RNG.integers(110, 140, (*lead, 3)).astype(np.uint8)
    arrays: Arrays = {"packed": ("U8", packed), "scale": ("U8", byte)}
    weight, got = read(microscaling, arrays, quant_method="auto-round", **table)
    assert str(weight.config) == "4bit-g32"
    assert weight.form == "MXINT4"

    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*lead, 96)
    values = np.where(codes & 8, -1.0, 1.0) * (codes & 7) / 4
    sizes = np.repeat(2.0 ** (byte.astype(np.float32) - 127), 32, -1)
    np.testing.assert_array_equal(got, values * sizes)


def test_wider_integers_with_shared_exponents_are_refused() -> None:
    arrays: Arrays = {
        "": ("F8_E4M3", np.zeros((8, 64), np.uint8)),
        "scale": ("U8", np.zeros((8, 2), np.uint8)),
    }
    with pytest.raises(Unread, match="MXINT8"):
        read(microscaling, arrays, quant_method="auto-round", data_type="mx_int")


@pytest.mark.parametrize("role", ["scale", "scale_inv"])
@pytest.mark.parametrize("lead", LEADS)
def test_mxfp8_stays(lead: tuple[int, ...], role: str) -> None:
    codes = RNG.integers(0, 126, (*lead, 96)).astype(np.uint8)
    byte = RNG.integers(110, 140, (*lead, 3)).astype(np.uint8)
    weight, got = read(microscaling, {"": ("F8_E4M3", codes), role: ("U8", byte)})
    assert str(weight.config) == "mxfp8"
    sizes = np.repeat(2.0 ** (byte.astype(np.float32) - 127), 32, -1)
    np.testing.assert_array_equal(got, e4m3(codes) * sizes)


def test_fused_experts_of_nvfp4_have_a_number_for_each_half() -> None:
    packed, values = four_bits(3, 8, 32)
    scales = RNG.integers(20, 60, (3, 8, 4)).astype(np.uint8)
    wholes = RNG.random((3, 2)).astype(np.float32)
    arrays: Arrays = {
        "": ("U8", packed),
        "scale": ("F8_E4M3", scales),
        "scale_2": ("F32", wholes),
    }
    weight, got = read(nvfp4, arrays)
    assert weight.config is None
    factors = np.repeat(wholes, 4, axis=1)[..., None]
    np.testing.assert_allclose(got, values * np.repeat(e4m3(scales), 16, -1) * factors, rtol=1e-6)

    # Their names, as ModelOpt writes them.
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    infos = {f"{stem}{end}": TensorInfo("U8", (1,), 0, 1) for end in NVFP4_ENDS}
    (grouped,) = group_tensors(infos).values()
    assert (grouped.stem, grouped.roles) == (stem, {"", "scale", "scale_2"})


def test_powers_of_two_for_blocks_are_not_mxfp8() -> None:
    arrays: Arrays = {
        "": ("F8_E4M3", np.zeros((256, 256), np.uint8)),
        "scale_inv": ("F8_E8M0", np.zeros((2, 2), np.uint8)),
    }
    assert matched(microscaling, arrays) is None
    assert matched(fp8, arrays) is not None


@pytest.mark.parametrize("lead", LEADS)
def test_nvfp4_of_compressed_tensors_is_divided_by_its_number(lead: tuple[int, ...]) -> None:
    packed, values = four_bits(*lead, 32)
    scales = RNG.integers(1, 120, (*lead, 4)).astype(np.uint8)
    whole = (RNG.random(lead[:-1] or (1,)) + 500).astype(np.float32)
    arrays: Arrays = {
        "packed": ("U8", packed),
        "scale": ("F8_E4M3", scales),
        "global_scale": ("F32", whole),
    }
    weight, got = read(nvfp4, arrays)
    assert weight.config is None
    expected = values * np.repeat(e4m3(scales), 16, -1) / whole.reshape(*lead[:-1], 1, 1)
    np.testing.assert_allclose(got, expected.reshape(got.shape), rtol=1e-6)


@pytest.mark.parametrize("lead", LEADS)
def test_nvfp4_of_modelopt_is_multiplied_with_its_number(lead: tuple[int, ...]) -> None:
    packed, values = four_bits(*lead, 32)
    scales = RNG.integers(1, 120, (*lead, 4)).astype(np.uint8)
    whole = RNG.random(lead[:-1]).astype(np.float32)
    arrays: Arrays = {
        "": ("U8", packed),
        "scale": ("F8_E4M3", scales),
        "scale_2": ("F32", whole),
    }
    _, got = read(nvfp4, arrays)
    expected = values * np.repeat(e4m3(scales), 16, -1) * whole.reshape(*lead[:-1], 1, 1)
    np.testing.assert_allclose(got, expected.reshape(got.shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": ("F8_E4M3", np.ones((8, 2), np.uint8))}, "not one for each 16 columns"),
        ({"global_scale": ("F32", np.ones(8, np.float32))}, "instead of one number"),
        ({"zero_point": ("U8", np.ones((8, 4), np.uint8))}, "with other tensors than NVFP4 has"),
    ],
)
def test_other_nvfp4_is_refused(change: Arrays, reason: str) -> None:
    arrays: Arrays = {
        "packed": ("U8", np.zeros((8, 32), np.uint8)),
        "scale": ("F8_E4M3", np.zeros((8, 4), np.uint8)),
        "global_scale": ("F32", np.ones(1, np.float32)),
    }
    with pytest.raises(Unread, match=reason):
        matched(nvfp4, arrays | change)
