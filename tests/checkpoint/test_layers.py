"""What a model's layers are: roles, guards, shares, types."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from families import write_family
from helpers import Maker, edit_weights, llama, mixtral, qwen3_moe

from mint_mlx.base.quant_config import KEEP, QuantConfig
from mint_mlx.checkpoint.layers import Inventory, Layer, list_layers
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.jobs.convert import convert
from mint_mlx.rules.recipes import candidates, find_recipe


def inventory(folder: Path) -> Inventory:
    source = load_source(str(folder))
    return list_layers(open_model(source), source.config)


def by_path(layers: Inventory) -> dict[str, Layer]:
    return {layer.path: layer for layer in layers.layers}


def test_experts_of_one_projection_are_one_layer(make: Maker) -> None:
    layers = by_path(inventory(make(qwen3_moe(2))))
    down = layers["model.layers.1.mlp.switch_mlp.down_proj"]
    assert down.shape == (4, 128, 64)
    assert (down.role, down.kind) == ("expert_down", "experts")
    assert down.reads == 0.5
    assert down.block == 1
    assert layers["model.layers.0.self_attn.q_proj"].role == "attention"
    assert layers["lm_head"].role == "head"
    assert layers["model.embed_tokens"].reads == 1 / 96


def test_a_router_is_never_below_8_bits_even_where_its_class_does_not_care(make: Maker) -> None:
    qwen = by_path(inventory(make(qwen3_moe(1, experts=8), "a")))["model.layers.0.mlp.gate"]
    assert (qwen.role, qwen.floor, qwen.class_config) == ("router", 8, QuantConfig(8, 64))
    layers = by_path(inventory(make(mixtral(1, experts=8), "b")))
    router = layers["model.layers.0.block_sparse_moe.gate"]
    assert (router.role, router.floor) == ("router", 8)
    assert router.objection(QuantConfig(6, 64))
    assert not router.objection(QuantConfig(8, 128))

    # What the source stores with fewer stays: more bits bring nothing back.
    poor = replace(router, stored=QuantConfig(3, 64))
    assert candidates(poor, find_recipe("mixtral", {})) == (QuantConfig(3, 64),)
    assert poor.objection(QuantConfig(3, 32))


def test_a_gate_whose_outputs_are_not_a_multiple_of_8_stays(make: Maker) -> None:
    router = by_path(inventory(make(mixtral(1, experts=6))))["model.layers.0.block_sparse_moe.gate"]
    assert router.keep
    assert router.objection(QuantConfig(8, 64))
    assert not router.objection(KEEP)


def test_only_the_embedding_of_tokens_is_a_tied_head(tmp_path: Path) -> None:
    """Not one of positions, nor a table for every block."""
    per_block = {
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 96,
        "tie_word_embeddings": True,
    }
    for family, more in (("gpt2", {}), ("gemma4_text", per_block)):
        layers = inventory(write_family(tmp_path / family, family, **more)).layers
        reads = {
            layer.path.rpartition(".")[2]: layer.reads
            for layer in layers
            if layer.role == "embedding"
        }
        first, second = reads
        assert (first, second) in (("wte", "wpe"), ("embed_tokens", "embed_tokens_per_layer"))
        assert reads[first] == 1
        assert reads[second] < 0.1


def test_a_tied_embedding_is_the_head_and_counts_once(make: Maker) -> None:
    tied = inventory(make(llama(1, tied=True), "tied"))
    embedding = by_path(tied)["model.embed_tokens"]
    assert embedding.reads == 1.0
    assert "lm_head" not in by_path(tied)
    untied = inventory(make(llama(1), "untied"))
    assert untied.parameters - tied.parameters == 96 * 128


def test_every_parameter_is_accounted_for(make: Maker) -> None:
    folder = make(qwen3_moe(2))
    layers = inventory(folder)
    stored = sum(a.size for a in mx.load(str(folder / "model.safetensors")).values())
    assert layers.parameters == stored


def test_float32_is_written_as_bfloat16_unless_the_config_says_float16(make: Maker) -> None:
    folder = make(llama(1), dtype=mx.float32)
    config = json.loads((folder / "config.json").read_text())
    for stated, written in (("float32", "BF16"), ("float16", "F16"), (None, "BF16")):
        config["torch_dtype"] = stated
        (folder / "config.json").write_text(json.dumps(config))
        assert {layer.dtype for layer in inventory(folder).layers} == {written}


def test_both_names_of_the_type_are_read(make: Maker) -> None:
    folder = make(llama(1), dtype=mx.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    config["dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    assert {layer.dtype for layer in inventory(folder).layers} == {"F16"}


def test_active_bytes_count_the_chosen_experts_only(make: Maker) -> None:
    layers = inventory(make(qwen3_moe(1)))
    dense = {layer.path: KEEP for layer in layers.layers}
    experts = sum(2 * layer.size for layer in layers.layers if layer.kind == "experts")
    embedding = 2 * 96 * 128
    assert layers.active_bytes(dense) == 2 * layers.parameters - experts // 2 - embedding + 2 * 128


@pytest.mark.parametrize("family", ["dots1", "deepseek_v3"])
def test_what_routers_add_to_their_scores_stays_float32(family: str, tmp_path: Path) -> None:
    """mlx-lm's dots1 doesn't say that it may not be cast."""
    folder = write_family(tmp_path / "model", family)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    values = 8 + mx.arange(8) / 1000
    edit_weights(folder, lambda weights: weights | {bias: values})
    result = convert(str(folder), uniform="8bit-g32", out=tmp_path / "out", smoke=False)
    written = mx.load(str(result.path / "model.safetensors"))[bias]
    assert written.dtype == mx.float32
    assert mx.array_equal(written, values)
