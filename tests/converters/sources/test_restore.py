"""Packed weights go through a model class that knows nothing of them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from formulas import as_numpy, bf16, e4m3, raw, weight
from helpers import (
    Maker,
    Model,
    Notes,
    RawTensors,
    edit_config,
    edit_weights,
    llama,
    order_for,
    qwen3_moe,
    rewrite_shards,
    write_checkpoint,
)
from mlx.utils import tree_flatten
from quantized import bit_stream, checkpoint, raw_tensor
from released import known, released

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.checkpoint.layer_stream import stream
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.converters.sources.packed import Codes, Packed
from mint_mlx.converters.sources.restore import UNUSED, restore, rounded, unpack
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request

RNG = np.random.default_rng(8)
SCHEME = {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}
INT4 = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": SCHEME}}}


def int4(rows: int, columns: int) -> tuple[RawTensors, np.ndarray]:
    """The tensors of a weight of packed integers by their last names, and its values."""
    codes = RNG.integers(0, 16, (rows, columns))
    scales = bf16(RNG.random((rows, columns // 32)).astype(np.float32))
    tensors = {
        "weight_packed": raw_tensor("I32", bit_stream(codes, 4)),
        "weight_scale": raw_tensor("F32", scales),
        "weight_shape": raw_tensor("I64", np.array([rows, columns])),
    }
    return tensors, bf16((codes - 8) * np.repeat(scales, 32, 1))


def replace(folder: Path, layers: dict[str, RawTensors]) -> Path:
    """Put packed tensors in place of layers' weights."""

    def change(tensors: RawTensors) -> None:
        for layer, packed in layers.items():
            del tensors[f"{layer}.weight"]
            tensors.update({f"{layer}.{leaf}": tensor for leaf, tensor in packed.items()})

    rewrite_shards(folder, change)
    edit_config(folder, quantization_config=INT4)
    return folder


def test_experts_of_any_family_are_stacked(make: Maker, tmp_path: Path) -> None:
    folder = make(qwen3_moe(1))
    base = "model.layers.0.mlp"
    experts = {f"{base}.experts.{e}.up_proj": int4(64, 128) for e in range(4)}
    replace(folder, {layer: tensors for layer, (tensors, _) in experts.items()})
    job = prepare(str(folder))
    layer = next(x for x in job.inventory.layers if x.path == f"{base}.switch_mlp.up_proj")
    assert layer.stored == QuantConfig(4, 32)
    expected = np.stack([values for _, values in experts.values()])
    np.testing.assert_array_equal(weight(folder, layer.path), expected)

    # The result holds the codes, too.
    result = convert.convert(str(folder), "16bpw", tmp_path / "out", smoke=False)
    assert result.plan.choice[layer.path] == layer.stored
    np.testing.assert_array_equal(weight(tmp_path / "out", layer.path), expected)


def test_experts_of_unlike_formats_are_dequantized(make: Maker) -> None:
    folder = make(qwen3_moe(1))
    layer = "model.layers.0.mlp.experts.2.up_proj"
    tensors, values = int4(64, 128)
    replace(folder, {layer: tensors})
    inventory = prepare(str(folder)).inventory
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    assert next(x for x in inventory.layers if x.path == path).stored is None
    np.testing.assert_array_equal(weight(folder, path)[2], values)


def test_a_latent_projection_is_dequantized_before_it_is_split(tmp_path: Path) -> None:
    """mlx-lm splits `kv_b_proj` of int4 and quantizes it again, with an error of 7 %."""
    if not known("kimi_k2"):
        pytest.skip("this mlx-lm has no such family")
    folder = released("kimi_k2", tmp_path / "model")
    name = "model.layers.1.self_attn.kv_b_proj"
    tensors, values = int4(*raw(folder, f"{name}.weight").shape)
    replace(folder, {name: tensors})
    config = json.loads((folder / "config.json").read_text())
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    by_head = values.reshape(heads, -1, values.shape[-1])
    base = "model.layers.1.self_attn"
    wk = np.swapaxes(by_head[:, :nope], -1, -2)
    np.testing.assert_array_equal(weight(folder, f"{base}.embed_q"), wk)
    np.testing.assert_array_equal(weight(folder, f"{base}.unembed_out"), by_head[:, nope:])


def test_fused_experts_with_a_scale_each(tmp_path: Path) -> None:
    """As Mistral-Small-4: `gate_up_proj` (experts, 2 x rows, columns), scales (experts, 1, 1)."""
    if not find_spec("mlx_lm.models.mistral4"):
        pytest.skip("this mlx-lm has no such family")
    folder = write_checkpoint(tmp_path / "model", _mistral4())
    base = "model.layers.0.mlp"
    fused = {"gate_up_proj": (4, 128, 128), "down_proj": (4, 128, 64)}
    codes = {name: RNG.integers(0, 126, shape).astype(np.uint8) for name, shape in fused.items()}
    scales = {name: RNG.random((4, 1, 1)).astype(np.float32) for name in fused}

    def change(tensors: RawTensors) -> None:
        for name in fused:
            tensors[f"{base}.experts.{name}"] = raw_tensor("F8_E4M3", codes[name])
            tensors[f"{base}.experts.{name}_scale_inv"] = raw_tensor("F32", scales[name])
            tensors[f"{base}.experts.{name}_activation_scale"] = raw_tensor("F32", scales[name])

    rewrite_shards(folder, change)
    table = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    edit_config(folder, quantization_config=table)
    values = {name: bf16(e4m3(codes[name]) * scales[name]) for name in fused}
    switch = f"{base}.switch_mlp"
    np.testing.assert_array_equal(weight(folder, f"{switch}.down_proj"), values["down_proj"])
    np.testing.assert_array_equal(
        weight(folder, f"{switch}.up_proj"), values["gate_up_proj"][:, 64:]
    )


def _mistral4() -> Model:
    """A Mistral-4 of one block, without its experts."""
    block = "model.layers.0"
    attention = {
        "q_a_proj": (64, 128),
        "q_a_layernorm": (64,),
        "q_b_proj": (128, 64),
        "kv_a_proj_with_mqa": (48, 128),
        "kv_a_layernorm": (32,),
        "kv_b_proj": (192, 32),
        "o_proj": (128, 128),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (96, 128),
        "lm_head.weight": (96, 128),
        "model.norm.weight": (128,),
        f"{block}.input_layernorm.weight": (128,),
        f"{block}.post_attention_layernorm.weight": (128,),
        f"{block}.mlp.gate.weight": (4, 128),
        f"{block}.mlp.shared_experts.down_proj.weight": (128, 64),
    }
    shapes |= {f"{block}.self_attn.{name}.weight": shape for name, shape in attention.items()}
    shapes |= {f"{block}.mlp.shared_experts.{n}_proj.weight": (64, 128) for n in ("gate", "up")}
    config = {
        "model_type": "mistral4",
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.0,
            "original_max_position_embeddings": 512,
        },
        "torch_dtype": "bfloat16",
    }
    return config, shapes


class Scaling(nn.Module):
    """A model whose `sanitize` scales one weight in place, as Falcon-H1's does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 8, bias=False)
        self.b = nn.Linear(64, 8, bias=False)

    def sanitize(self, weights: dict[str, mx.array], factor: float = 1) -> dict[str, mx.array]:
        for array in weights.values():
            if factor != 1:
                array *= factor
        return weights


@pytest.mark.parametrize("factor", [1, 3])
def test_a_weight_that_is_scaled_in_place_is_dequantized(factor: float) -> None:
    model = Scaling()
    packed, loaded, dense = [], {}, {}
    for name in ("a.weight", "b.weight"):
        array = mx.array(RNG.standard_normal((8, 64)).astype(np.float32))
        quantized = mx.quantize(array, 32, 4)
        loaded[f"{name}_packed"] = quantized[0]
        dense[name] = as_numpy(mx.dequantize(*quantized, 32, 4))
        packed.append(_packed(name, quantized))
    weights, codes = unpack(loaded, packed, mx.float32)
    weights = model.sanitize(weights, factor)
    configs = restore(model, weights, codes, {}, mx.bfloat16)
    assert set(configs) == ({"a", "b"} if factor == 1 else set())
    if factor != 1:
        for name, values in dense.items():
            np.testing.assert_allclose(as_numpy(weights[name]), values * factor, rtol=1e-6)


def _packed(name: str, codes: Any) -> Packed:
    from quantized import group

    tensors = group({"packed": ("U32", np.zeros(1))}, name)
    return Packed(tensors, "", (8, 64), QuantConfig(4, 32), lambda _: Codes(*codes))


def test_a_bias_follows_its_rounded_scale() -> None:
    scales = mx.array([[1.001, 0.0, 3.0]])
    biases = mx.array([[-8.008, 0.5, -24.0]])
    small = rounded(scales, biases, mx.bfloat16)
    assert {array.dtype for array in small.values()} == {mx.bfloat16}
    np.testing.assert_array_equal(as_numpy(small["scales"]), [[1.0, 0.0, 3.0]])
    np.testing.assert_array_equal(as_numpy(small["biases"]), [[-8.0, 0.5, -24.0]])
    exact = rounded(scales, biases, None)
    assert exact == {"scales": scales, "biases": biases}


def test_what_only_serving_needs_is_dropped(make: Maker) -> None:
    folder = make(llama(1))
    base = "model.layers.0.self_attn"
    before = {n for n, _ in tree_flatten(open_model(load_source(str(folder))).parameters())}
    extra = (
        f"{base}.k_scale",
        f"{base}.k_proj.k_scale",
        f"{base}.v_proj.v_scale",
        f"{base}.q_proj.input_scale",
        f"{base}.q_proj.activation_scale",
        f"{base}.q_proj.input_global_scale",
        f"{base}.q_proj.input_scale_ub",
        f"{base}.q_proj.input_quantizer._amax",
        f"{base}.k_zero_point",
        f"{base}.v_global_scale",
        f"{base}.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        f"{base}.rotary_emb.cos_cached",
        "model.embeddings.position_ids",
        "v_head.summary.weight",
        "v_head.summary.bias",
        "model.layers.0.mlp.experts.gate_up_proj_activation_scale",
    )
    assert all(UNUSED.fullmatch(name) for name in extra)
    assert not UNUSED.fullmatch("model.layers.0.router.scale")
    assert not UNUSED.fullmatch("score.weight")  # of a model that classifies
    assert not UNUSED.fullmatch(f"{base}.q_proj.weight_zero_point")
    assert not UNUSED.fullmatch(f"{base}.q_proj.input_quantizer._pre_quant_scale")
    edit_weights(folder, lambda w: w | {name: mx.ones(1) for name in extra})

    def empty(tensors: RawTensors) -> None:
        tensors["model.layers.0.mlp.nothing"] = ("F32", [0, 4], b"")

    rewrite_shards(folder, empty)
    after = {n for n, _ in tree_flatten(open_model(load_source(str(folder))).parameters())}
    assert before == after


def test_null_in_an_mlx_config_means_the_default(make: Maker, tmp_path: Path) -> None:
    convert.convert(str(make(llama(1))), uniform="4bit-g64", out=tmp_path / "four", smoke=False)
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    table = {
        key: entry | {"group_size": None} if isinstance(entry, dict) else entry
        for key, entry in config["quantization"].items()
    }
    path = "model.layers.0.mlp.gate_proj"
    table[path] = {"group_size": None, "bits": 4, "mode": "affine"}
    before = weight(tmp_path / "four", path)
    edit_config(tmp_path / "four", quantization=table)
    np.testing.assert_array_equal(weight(tmp_path / "four", path), before)
    result = convert.convert(str(tmp_path / "four"), "3.7bpw", tmp_path / "out", smoke=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert all(entry["group_size"] for entry in written.values() if isinstance(entry, dict))
    assert result.bytes < sum(f.stat().st_size for f in (tmp_path / "four").glob("*.safetensors"))


def test_mixed_formats_are_told_apart_by_their_tensors(tmp_path: Path) -> None:
    """FP8 attention, experts of int4: what config.json says of both overlaps."""
    folder = checkpoint("ct-MIX", tmp_path / "model")
    notes = Notes()
    order_for(Request(str(folder), budget="5bpw"), notes)
    note = next(note for note in notes.said if "FP8 with one scale a row" in note)
    assert "4-bit integers (symmetric, one scale a group of 32) (4 weights)" in note
    assert "MLX holds its codes as they are (4bit-g32)" in note


def test_mxfp8_with_experts_of_nvfp4_is_not_all_mxfp8(tmp_path: Path) -> None:
    folder = checkpoint("ct-NVFP4A16", tmp_path / "model")
    name = "model.layers.0.self_attn.v_proj"

    def change(tensors: RawTensors) -> None:
        rows, columns = tensors[f"{name}.weight"][1]
        codes = RNG.integers(0, 126, (rows, columns)).astype(np.uint8)
        tensors[f"{name}.weight"] = raw_tensor("F8_E4M3", codes)
        bytes_ = np.full((rows, columns // 32), 120)
        tensors[f"{name}.weight_scale_inv"] = raw_tensor("U8", bytes_)

    rewrite_shards(folder, change)
    table = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "moe_quant_algo": "NVFP4"}
    edit_config(folder, quantization_config=table)
    stored = {layer.path: layer.stored for layer in prepare(str(folder)).inventory.layers}
    assert str(stored[name]) == "mxfp8"
    assert stored["model.layers.0.mlp.switch_mlp.gate_proj"] is None


def test_a_plan_made_from_headers_must_fit_what_arrives(tmp_path: Path) -> None:
    """With --low-disk a layer is planned before its `g_idx` is there, as config.json says."""
    folder = checkpoint("ar-gptq-sym", tmp_path / "model")
    job = prepare(str(folder))
    layer = next(x for x in job.inventory.layers if x.stored)

    def reorder(tensors: RawTensors) -> None:
        columns = layer.shape[-1]
        order = np.arange(columns)[::-1] // 128
        tensors[f"{layer.path}.g_idx"] = raw_tensor("I32", order)

    rewrite_shards(folder, reorder)
    with pytest.raises(MintError, match=f"{layer.path} cannot stay as it is"):
        list(stream(job.source, job.inventory, [layer.path]))
