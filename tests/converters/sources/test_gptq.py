"""GPTQ, AutoRound and AWQ: (code - zero) x scale, packed the other way round."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from quantized import Arrays, bit_stream, group, matched, read

from mint_mlx.converters.sources import awq, gptq
from mint_mlx.converters.sources.packed import Unread, dequantize
from mint_mlx.converters.sources.stated import Stated

RNG = np.random.default_rng(5)
ROWS, COLUMNS = 96, 256
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """GPTQModel's own layout: for 32 codes the words of their low bits, then of their high ones."""
    blocks = codes.reshape(len(codes), -1, 32)
    words = []
    offset = 0
    for width in PLANES[bits]:
        plane = blocks >> offset & 2**width - 1
        by_word = plane.reshape(*plane.shape[:2], width, 32 // width).astype(np.uint32)
        shifts = np.arange(32 // width, dtype=np.uint32) * width
        words.append(np.bitwise_or.reduce(by_word << shifts, axis=-1))
        offset += width
    return np.concatenate(words, axis=-1).reshape(len(codes), -1).view(np.int32)


def gptq_tensors(
    bits: int, group: int, stored: int = 0, planar: bool = False, middle: bool = False
) -> tuple[Arrays, np.ndarray]:
    """A weight's tensors, and its values; `stored` is what the format adds to a zero point."""
    into_words = planes if planar else bit_stream
    codes = RNG.integers(0, 2**bits, (ROWS, COLUMNS))
    zeros = RNG.integers(1, 2**bits, (ROWS, COLUMNS // group))
    if middle:
        zeros[:] = 2 ** (bits - 1)
    scales = RNG.random(zeros.shape).astype(np.float16)
    arrays: Arrays = {
        "qweight": ("I32", into_words(codes, bits).T),
        "qzeros": ("I32", into_words((zeros + stored).T, bits)),
        "scales": ("F16", scales.T),
        "g_idx": ("I32", (np.arange(COLUMNS) // group).astype(np.int32)),
    }
    wide = [np.repeat(n.astype(np.float32), group, 1) for n in (zeros, scales)]
    return arrays, (codes - wide[0]) * wide[1]


@pytest.mark.parametrize("of_all", [True, False])
@pytest.mark.parametrize(
    ("key", "is_meant"),
    [
        ("model.layers.0.self_attn.k_proj", True),
        ("k_proj", True),
        (".*self_attn.*", True),
        ("layers.0.self_attn", True),
        ("q_proj", False),
        ("layers.1.self_attn", False),
        ("self_attn(", False),
    ],
)
def test_what_autoround_wrote_without_the_model_goes_by_each_layer(
    key: str, is_meant: bool, of_all: bool
) -> None:
    """As AutoRound 0.16.1 does with no iterations: asymmetric layers keep their zero points."""
    table = {"packing_format": "auto_round:auto_gptq" if of_all else "auto_round", "sym": of_all}
    table |= {"quant_method": "auto-round", "model_free": True}
    table["extra_config"] = {key: {"sym": not of_all}, "lm_head": None}
    symmetric = of_all != is_meant
    arrays, expected = gptq_tensors(4, 64, -1 if symmetric else 0, middle=symmetric)
    of_layer = group(arrays, "model.layers.0.self_attn.k_proj.weight")
    weight = gptq.match(of_layer, Stated(table, lambda _: arrays["g_idx"][1]))
    assert weight is not None
    assert weight.config is not None
    assert ("asymmetric" in weight.form) != symmetric
    codes = weight.read({role: mx.array(values) for role, (_, values) in arrays.items()})
    values = np.array(dequantize(codes, weight.config))
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, COLUMNS])
def test_every_width_stays(bits: int, group: int) -> None:
    arrays, expected = gptq_tensors(bits, group, -1)
    weight, values = read(gptq, arrays, quant_method="gptq", bits=bits, desc_act=False)
    assert str(weight.config) == f"{bits}bit-g{min(group, 128)}"
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


def last_group_is_short(columns: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (rows, columns), scales (rows, groups), and the weight with zero points of 8."""
    codes = RNG.integers(0, 16, (ROWS, columns))
    scales = RNG.random((ROWS, -(-columns // group))).astype(np.float16)
    wide = np.repeat(scales.astype(np.float32), group, 1)[:, :columns]
    return codes, scales, (codes - 8) * wide


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("columns", [192, 960])
def test_the_last_group_may_be_short(columns: int, with_index: bool) -> None:
    """192 columns in groups of 128 have as many scales as in groups of 96."""
    codes, scales, expected = last_group_is_short(columns, 128)
    zeros = np.full(scales.shape, 7)  # less one
    arrays: Arrays = {
        "qweight": ("I32", bit_stream(codes, 4).T),
        "qzeros": ("I32", bit_stream(zeros.T, 4)),
        "scales": ("F16", scales.T),
    }
    if with_index:
        arrays["g_idx"] = ("I32", (np.arange(columns) // 128).astype(np.int32))
    weight, values = read(gptq, arrays, quant_method="gptq", bits=4, group_size=128, sym=True)
    assert "group of 128" in weight.form
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("table", "stored"),
    [
        ({"quant_method": "gptq"}, -1),
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, -1),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, 0),
        ({"quant_method": "gptq", "format": "gptq_v2"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, -1),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, 0),
        ({"quant_method": "auto-round"}, -1),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"}, 0),
    ],
)
def test_zero_points_of_each_format(table: dict[str, Any], stored: int) -> None:
    arrays, expected = gptq_tensors(4, 64, stored)
    _, values = read(gptq, arrays, bits=4, sym=False, **table)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("stored", [-1, 0])
@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_a_symmetric_zero_is_in_the_middle_whatever_the_format_says(name: str, stored: int) -> None:
    arrays, expected = gptq_tensors(4, 64, stored, middle=True)
    _, values = read(gptq, arrays, quant_method="gptq", sym=True, checkpoint_format=name)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("table", "symmetric"),
    [
        ({"dynamic": {r"+:.*\.down_proj": {"bits": 8}, r"-:.*\.q_proj": {}}}, True),
        ({"dynamic": {r"+:.*\.down_proj": {"sym": False}}}, False),
        ({"extra_config": {"model.layers.0.mlp.up_proj": {"sym": False}}}, False),
        ({"extra_config": {}, "dynamic": None}, True),
    ],
)
def test_single_layers_may_have_zeros_of_their_own(table: dict[str, Any], symmetric: bool) -> None:
    arrays, _ = gptq_tensors(4, 64, -1)
    weight, _ = read(gptq, arrays, quant_method="gptq", sym=True, **table)
    assert weight.symmetric is symmetric


def test_a_zero_point_of_nothing_wraps_around() -> None:
    arrays, _ = gptq_tensors(4, 64, -1)
    arrays["qzeros"] = ("I32", np.full(arrays["qzeros"][1].shape, -1, dtype=np.int32))
    _, values = read(gptq, arrays, quant_method="gptq")
    assert values.min() >= 0  # 15 + 1 is 0 in four bits


@pytest.mark.parametrize(
    ("bits", "table"),
    [
        (3, {"format": "gptq_p"}),
        (5, {}),
        (6, {"checkpoint_format": "gptq"}),
        (7, {"format": "gptq_p"}),
    ],
)
def test_bits_in_planes(bits: int, table: dict[str, Any]) -> None:
    arrays, expected = gptq_tensors(bits, 64, 0, planar=True)
    weight, values = read(gptq, arrays, quant_method="gptq", **table)
    assert str(weight.config) == f"{8 if bits == 7 else bits}bit-g64"
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_autoround_packs_every_width_without_a_gap(bits: int) -> None:
    arrays, expected = gptq_tensors(bits, 64, 0)
    table = {"quant_method": "auto-round", "packing_format": "auto_round"}
    _, values = read(gptq, arrays, **table)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-4)


def test_columns_in_another_order_are_dequantized() -> None:
    arrays, expected = gptq_tensors(4, 64, -1)
    order = RNG.permutation(COLUMNS)
    arrays["g_idx"] = ("I32", arrays["g_idx"][1][order])
    codes = arrays["qweight"][1].T.copy().view(np.uint32)[..., None] >> np.arange(0, 32, 4) & 15
    arrays["qweight"] = ("I32", bit_stream(codes.reshape(ROWS, -1)[:, order].astype(int), 4).T)
    for local, table in ((True, {"desc_act": False}), (False, {"desc_act": True})):
        weight = matched(gptq, arrays, local, quant_method="gptq", **table)
        assert weight is not None and weight.config is None
        assert "reordered" in weight.form
    _, values = read(gptq, arrays, quant_method="gptq", desc_act=True)
    np.testing.assert_allclose(values, expected[:, order], rtol=2e-6, atol=1e-5)


def test_static_groups_are_in_order() -> None:
    arrays, expected = gptq_tensors(4, 64, -1)
    table = {"quant_method": "gptq", "desc_act": True, "static_groups": True}
    weight, values = read(gptq, arrays, **table)
    assert str(weight.config) == "4bit-g64"
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-5)


def test_a_bias_of_zeros_that_the_model_lacks_is_dropped() -> None:
    name = "model.layers.0.mlp.up_proj"
    weights = {f"{name}.qweight": mx.ones((1, 8)), f"{name}.bias": mx.zeros(8)}
    assert gptq.without_zero_biases(nn.Module(), weights).keys() == {f"{name}.qweight"}
    other = weights | {f"{name}.bias": mx.ones(8)}
    assert gptq.without_zero_biases(nn.Module(), other) == other  # mlx-lm refuses it


def test_g_idx_of_zeros_means_nothing() -> None:
    arrays, expected = gptq_tensors(4, 16, -1)  # a group that MLX lacks
    arrays["g_idx"] = ("I32", np.zeros(COLUMNS, dtype=np.int32))
    weight, values = read(gptq, arrays, quant_method="gptq")
    assert weight.config is None
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-5)


def test_tensors_that_do_not_fit_are_refused() -> None:
    arrays, _ = gptq_tensors(4, 64)
    arrays["qweight"] = ("I32", arrays["qweight"][1][:-1])
    with pytest.raises(Unread, match="do not fit each other"):
        matched(gptq, arrays, quant_method="gptq")


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("group", "config"), [(128, "4bit-g128"), (16, "None")])
def test_awq_is_packed_along_the_outputs(zeros: bool, group: int, config: str) -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def into_words(codes: np.ndarray) -> np.ndarray:
        by_word = codes.reshape(len(codes), -1, 8)[..., order].reshape(len(codes), -1)
        return bit_stream(by_word, 4)

    codes = RNG.integers(0, 16, (COLUMNS, ROWS))
    zero = RNG.integers(0, 16, (COLUMNS // group, ROWS))
    scales = RNG.random(zero.shape).astype(np.float16)
    arrays: Arrays = {"qweight": ("I32", into_words(codes)), "scales": ("F16", scales)}
    if zeros:
        arrays["qzeros"] = ("I32", into_words(zero))
    else:
        zero[:] = 8
    wide = [np.repeat(n.astype(np.float32), group, 0) for n in (zero, scales)]
    weight, values = read(awq, arrays, quant_method="awq", version="gemm")
    assert str(weight.config) == config
    assert matched(gptq, arrays) is None
    np.testing.assert_allclose(values, ((codes - wide[0]) * wide[1]).T, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    "table", [{"version": "GEMV"}, {"format": "gemv", "checkpoint_format": "gemv"}]
)
def test_other_versions_of_awq_are_refused(table: dict[str, str]) -> None:
    arrays: Arrays = {
        "qweight": ("I32", np.zeros((ROWS, COLUMNS // 8), dtype=np.int32)),
        "qzeros": ("I32", np.zeros((ROWS, 1), dtype=np.int32)),
        "scales": ("F16", np.zeros((ROWS, 8), dtype=np.float16)),
    }
    with pytest.raises(Unread, match="is AWQ of version gemv"):
        matched(awq, arrays, quant_method="awq", **table)


def test_scales_of_no_group_are_refused() -> None:
    arrays: Arrays = {
        "qweight": ("I32", np.zeros((32, 96), np.int32)),
        "qzeros": ("I32", np.zeros((0, 12), np.int32)),
        "scales": ("F16", np.zeros((0, 96), np.float16)),
    }
    with pytest.raises(Unread, match="0 groups, which 256 columns do not fall into"):
        matched(gptq, arrays, quant_method="gptq")


BY_GPTQMODEL = {"quant_method": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_gptqmodel_takes_the_ones_from_whole_words(bits: int, sym: bool) -> None:
    """A zero of 0 borrows from its neighbour: version 7.7.0 adds the ones to whole words again."""
    arrays, _ = gptq_tensors(bits, 64)
    zeros = RNG.integers(0, 3, (COLUMNS // 64, ROWS))
    assert (zeros == 0).any()
    words = bit_stream(zeros, bits).view(np.uint32) - np.uint32((2**32 - 1) // (2**bits - 1))
    arrays["qzeros"] = ("I32", words.view(np.int32))

    exact = dict(arrays, qzeros=("I32", bit_stream(zeros, bits)))
    _, expected = read(gptq, exact, quant_method="gptq", bits=bits, format="gptq_v2", sym=False)
    _, values = read(gptq, arrays, **BY_GPTQMODEL, bits=bits, format="gptq", sym=sym)
    np.testing.assert_array_equal(values, expected)

    # AutoGPTQ's take them from each alone.
    _, alone = read(gptq, arrays, quant_method="gptq", bits=bits, format="gptq", sym=False)
    assert (alone != expected).any()


def test_gptqmodel_s_embeddings_lie_on_their_side() -> None:
    """Version 7.7.0 packs an embedding along the vocabulary, and says so nowhere."""
    arrays, expected = gptq_tensors(8, 32, -1)
    stated = Stated(BY_GPTQMODEL | {"bits": 8, "format": "gptq"}, lambda _: arrays["g_idx"][1])
    weight = gptq.match(group(arrays, "model.embed_tokens.weight"), stated)
    assert weight is not None
    assert (weight.shape, weight.config) == ((COLUMNS, ROWS), None)
    values = weight.read({role: mx.array(array) for role, (_, array) in arrays.items()})
    np.testing.assert_allclose(np.array(values), expected.T, rtol=2e-6, atol=1e-4)
