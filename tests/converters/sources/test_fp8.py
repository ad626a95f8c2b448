"""FP8: code times scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from formulas import as_numpy, bf16, e4m3, raw, weight
from helpers import RawTensors, rewrite_shards
from quantized import matched, read
from released import RELEASED, released

from mint_mlx.converters.sources import fp8 as sources_fp8
from mint_mlx.converters.sources.fp8 import dequantize
from mint_mlx.converters.sources.packed import Unread


def test_fp8_blocks_that_overhang() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3, 200, 300)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # E4M3's NaN
    scale = rng.random((3, 2, 3)).astype(np.float32)
    wanted = e4m3(codes) * np.repeat(np.repeat(scale, 128, -2), 128, -1)[:, :200, :300]
    values = as_numpy(dequantize(mx.array(codes), mx.array(scale)).astype(mx.bfloat16))
    np.testing.assert_array_equal(values, bf16(wanted))


# mlx-lm dequantizes the first two families itself; nothing but our own hook reads the third.
@pytest.mark.parametrize(
    ("family", "path", "tensor"),
    [
        (
            "deepseek_v3",
            "model.layers.1.mlp.switch_mlp.down_proj",
            "model.layers.1.mlp.experts.{}.down_proj.weight",
        ),
        (
            "minimax_m2",
            "model.layers.0.block_sparse_moe.switch_mlp.up_proj",
            "model.layers.0.block_sparse_moe.experts.{}.w3.weight",
        ),
        (
            "qwen3_moe_fp8",
            "model.layers.1.mlp.switch_mlp.gate_proj",
            "model.layers.1.mlp.experts.{}.gate_proj.weight",
        ),
    ],
)
def test_fp8_experts_are_code_times_scale(family: str, path: str, tensor: str) -> None:
    folder = RELEASED / family
    wanted = []
    for expert in range(8):
        name = tensor.format(expert)
        scale = np.repeat(np.repeat(raw(folder, f"{name}_scale_inv"), 128, 0), 128, 1)[:64, :64]
        wanted.append(bf16(e4m3(raw(folder, name)) * scale))
    np.testing.assert_array_equal(weight(folder, path), np.stack(wanted))


def test_one_scale_a_tensor_is_code_times_scale(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def change(tensors: RawTensors) -> None:
        for scale in [n for n in tensors if n.endswith("_scale_inv")]:
            tensors[scale] = ("F32", [], np.float32(0.5).tobytes())
        tensors[name.replace("weight", "activation_scale")] = ("F32", [], np.float32(1).tobytes())

    folder = rewrite_shards(released("qwen3_moe_fp8", tmp_path / "model"), change)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["weight_block_size"]
    (folder / "config.json").write_text(json.dumps(config))
    wanted = bf16(e4m3(raw(folder, name)) * 0.5)
    np.testing.assert_array_equal(weight(folder, name.removesuffix(".weight")), wanted)


RNG = np.random.default_rng(2)


def fp8(rows: int, columns: int, experts: int = 0) -> np.ndarray:
    """Codes of finite E4M3 values."""
    shape = (experts, rows, columns) if experts else (rows, columns)
    codes = RNG.integers(0, 256, shape).astype(np.uint8)
    return np.where(codes & 0x7F == 0x7F, 0, codes)


# Shape of the weight and of its scales, what config.json says, and what that is.
SPELLINGS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = [
    ((96, 160), (), {}, "one scale a tensor"),
    ((96, 160), (1,), {}, "one scale a tensor"),
    ((96, 160), (1, 1), {"weight_block_size": None}, "one scale a tensor"),
    ((96, 160), (96,), {}, "one scale a row"),
    ((96, 160), (96, 1), {}, "one scale a row"),
    ((200, 300), (2, 3), {}, "blocks of 128x128"),
    ((200, 300), (2, 3), {"weight_block_size": [128, 128]}, "blocks of 128x128"),
    ((64, 64), (1, 1), {"weight_block_size": [128, 128]}, "blocks of 128x128"),
    ((200, 300), (7, 10), {"weight_block_size": [32, 32]}, "blocks of 32x32"),
    ((200, 300), (2, 1, 3, 1), {}, "blocks of 128x128"),
    ((4, 96, 160), (4, 1, 1), {}, "one scale a tensor"),
    ((4, 96, 160), (4,), {}, "one scale a tensor"),
    ((4, 96, 160), (), {}, "one scale a tensor"),
    ((4, 96, 160), (4, 96, 1), {}, "one scale a row"),
    ((4, 200, 300), (4, 2, 3), {}, "blocks of 128x128"),
]


@pytest.mark.parametrize(("shape", "scales", "table", "form"), SPELLINGS)
@pytest.mark.parametrize(("role", "code"), [("scale", "F32"), ("scale_inv", "BF16")])
def test_every_spelling_of_scales(
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    table: dict[str, Any],
    form: str,
    role: str,
    code: str,
) -> None:
    codes = fp8(*shape[-2:], *shape[:-2])
    numbers = bf16(RNG.random(scales).astype(np.float32))
    arrays = {"": ("F8_E4M3", codes), role: (code, numbers)}
    weight, values = read(sources_fp8, arrays, quant_method="fp8", **table)
    assert form in weight.form
    assert weight.config is None
    np.testing.assert_array_equal(values, e4m3(codes) * _wide(numbers, shape, table))


def _wide(numbers: np.ndarray, shape: tuple[int, ...], table: dict[str, Any]) -> np.ndarray:
    """Scales of any spelling over a whole weight."""
    if numbers.size == 1:
        return numbers.reshape(())
    block = (table.get("weight_block_size") or [128])[0]
    *lead, rows, columns = shape
    if numbers.size == np.prod(lead, dtype=int) * rows:
        return numbers.reshape(*lead, rows, 1)
    if numbers.size == np.prod(lead, dtype=int):
        return numbers.reshape(*lead, 1, 1)
    numbers = numbers.reshape(*lead, -(-rows // block), -(-columns // block))
    return np.repeat(np.repeat(numbers, block, -2), block, -1)[..., :rows, :columns]


@pytest.mark.parametrize(
    ("scales", "table"), [((128, 1), {}), ((2, 4), {"weight_block_size": [64, 64]})]
)
def test_gptqmodel_s_scales_divide(scales: tuple[int, ...], table: dict[str, Any]) -> None:
    """Version 7.7.0 calls them `weight_scale_inv` and writes 1 / scale."""
    codes, numbers = fp8(128, 256), (2000 + 400 * RNG.random(scales)).astype(np.float32)
    arrays = {"": ("F8_E4M3", codes), "scale_inv": ("F32", numbers)}
    stated = table | {"quant_method": "fp8", "weight_scale_semantics": "inverse"}
    _, values = read(sources_fp8, arrays, **stated)
    expected = e4m3(codes) / _wide(numbers, (128, 256), table)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((4, 64, 96), (4, 1, 96)), ((4, 96, 64), (4, 64, 1)), ((4, 64, 64), (4, 64, 1))],
)
def test_fbgemm_s_fused_experts_have_a_scale_a_column(
    shape: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    """As transformers 4.57.6 runs Llama-4's: (experts, inputs, outputs), `down_proj`'s turned."""
    codes, numbers = fp8(*shape[-2:], *shape[:-2]), RNG.random(scales).astype(np.float32)
    arrays = {"": ("F8_E4M3", codes), "scale": ("F32", numbers)}
    weight, values = read(sources_fp8, arrays, quant_method="fbgemm_fp8")
    assert "one scale a column" in weight.form
    np.testing.assert_array_equal(values, e4m3(codes) * numbers.reshape(4, 1, shape[-1]))


@pytest.mark.parametrize("code", ["U8", "F8_E8M0"])
def test_scales_that_are_bytes_are_powers_of_two(code: str) -> None:
    codes, byte = fp8(128, 256), np.array([[0, 130]], dtype=np.uint8)
    arrays = {"": ("F8_E4M3", codes), "scale": (code, byte)}
    _, values = read(sources_fp8, arrays)
    sizes = np.repeat(2.0 ** (byte.astype(np.float64) - 127), 128, 1)
    np.testing.assert_array_equal(values, (e4m3(codes) * sizes).astype(np.float32))


def test_blocks_that_compressed_tensors_states() -> None:
    weights = {"block_structure": [64, 32], "type": "float", "num_bits": 8}
    arrays = {"": ("F8_E4M3", fp8(128, 128)), "scale": ("F32", np.ones((2, 4), np.float32))}
    weight, _ = read(sources_fp8, arrays, config_groups={"group_0": {"weights": weights}})
    assert "blocks of 64x32" in weight.form


def test_a_zero_point_must_be_zero() -> None:
    codes = fp8(96, 160)
    arrays = {"": ("F8_E4M3", codes), "scale": ("F32", np.ones(96, np.float32))}
    arrays["shape"] = ("I64", np.array([96, 160]))
    zeros = np.zeros(96, np.int8)
    _, values = read(sources_fp8, arrays | {"zero_point": ("I8", zeros)})
    np.testing.assert_array_equal(values, e4m3(codes))
    zeros[3] = 1
    with pytest.raises(Unread, match="zero_point"):
        matched(sources_fp8, arrays | {"zero_point": ("I8", zeros)})


@pytest.mark.parametrize(
    ("code", "scales", "table", "reason"),
    [
        ("F8_E5M2", ("F32", ()), {}, "of type F8_E5M2"),
        ("F8_E4M3", ("I32", ()), {}, "scales of type I32"),
        ("F8_E4M3", ("F32", (3, 3)), {}, "not that of FP8 in blocks of 128x128"),
        ("F8_E4M3", ("F32", (1, 1)), {"weight_block_size": [64, 64]}, "in blocks of 64x64"),
    ],
)
def test_other_fp8_is_refused(
    code: str, scales: tuple[str, tuple[int, ...]], table: dict[str, Any], reason: str
) -> None:
    numbers = np.ones(scales[1], dtype=np.float32)
    arrays = {"": (code, fp8(96, 160)), "scale": (scales[0], numbers)}
    with pytest.raises(Unread, match=reason):
        matched(sources_fp8, arrays, **table)
