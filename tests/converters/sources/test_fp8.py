"""FP8: code times scale."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from formulas import as_numpy, bf16, e4m3, raw, weight
from helpers import RawTensors, rewrite_shards
from released import RELEASED, released

from mint_mlx.converters.sources.fp8 import dequantize


def test_fp8_blocks_that_overhang() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3, 200, 300)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # E4M3's NaN
    scale = rng.random((3, 2, 3)).astype(np.float32)
    wanted = e4m3(codes) * np.repeat(np.repeat(scale, 128, -2), 128, -1)[:, :200, :300]
    values = as_numpy(dequantize(mx.array(codes), mx.array(scale)))
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
