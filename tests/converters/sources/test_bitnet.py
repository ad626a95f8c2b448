"""BitNet of transformers: three values times one number, four of them to a byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from quantized import Arrays, group, matched, read

from mint_mlx.converters.sources import bitnet
from mint_mlx.converters.sources.packed import Unread
from mint_mlx.converters.sources.stated import Stated

RNG = np.random.default_rng(8)
ROWS, COLUMNS = 24, 192


def tensors() -> tuple[Arrays, np.ndarray]:
    """A weight's bytes and scale, and its values of -1, 0 and 1."""
    values = RNG.integers(-1, 2, (ROWS, COLUMNS))
    quarters = (values + 1).reshape(4, ROWS // 4, COLUMNS).astype(np.uint8)
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return {"": ("U8", packed), "scale": ("F32", np.array([4.0], np.float32))}, values


@pytest.mark.parametrize(
    ("table", "factor"),
    [
        ({}, 0.25),
        ({"linear_class": "bitlinear"}, 0.25),
        ({"linear_class": "autobitlinear", "quantization_mode": "offline"}, 4),
    ],
)
def test_packed_weights_stay(table: dict[str, Any], factor: float) -> None:
    arrays, values = tensors()
    weight, got = read(bitnet, arrays, quant_method="bitnet", **table)
    assert str(weight.config) == "2bit-g64"
    np.testing.assert_array_equal(got, values * factor)


def test_columns_that_no_group_divides_are_dequantized() -> None:
    arrays, values = tensors()
    arrays[""] = ("U8", arrays[""][1][:, :40])
    weight, got = read(bitnet, arrays, quant_method="bitnet")
    assert weight.config is None
    np.testing.assert_array_equal(got, values[:, :40] / 4)


def test_values_that_are_not_packed_are_multiplied() -> None:
    arrays, values = tensors()
    arrays[""] = ("F32", values.astype(np.float32))
    _, got = read(bitnet, arrays, quant_method="bitnet", linear_class="autobitlinear")
    np.testing.assert_array_equal(got, values * 4)


@pytest.mark.parametrize(
    ("stem", "reason"),
    [
        ("model.layers.0.mlp.up_proj.weight", "only when it runs"),
        ("model.layers.0.mlp.up_proj.rms_norm.weight", "a norm before a single layer"),
        ("lm_head.weight", None),
        ("model.embed_tokens.weight", None),
    ],
)
def test_what_is_rounded_when_it_runs_is_refused(stem: str, reason: str | None) -> None:
    arrays: Arrays = {"": ("F32", np.ones((8, 64), np.float32))}
    weight = group(arrays, stem)
    stated = Stated({"quant_method": "bitnet", "quantization_mode": "online"}, lambda _: np.ones(1))
    if reason is None:
        assert bitnet.match(weight, stated) is None
        return
    with pytest.raises(Unread, match=reason):
        bitnet.match(weight, stated)


def test_other_methods_are_left_alone() -> None:
    assert matched(bitnet, tensors()[0], quant_method="fp8") is None
