"""Values that no model has are refused by their key, and those of all families are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import Maker, edit_config, edit_weights, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.config_keys import adapt
from mint_mlx.checkpoint.config_values import check_values
from mint_mlx.checkpoint.mlxlm import build_model
from mint_mlx.checkpoint.source import load_source

FIXTURES = Path(__file__).parent.parent / "fixtures"


def config_at(name: str) -> dict[str, Any]:
    return dict(json.loads((FIXTURES / name / "config.json").read_text()))


def test_the_values_of_all_families_are_a_models() -> None:
    for path in FIXTURES.rglob("config.json"):
        config = json.loads(path.read_text())
        check_values(config)
        check_values(adapt(config))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_attention_heads", "two", "a whole number of at least 1"),
        ("num_hidden_layers", -1, "a whole number of at least 1"),
        ("hidden_size", 64.5, "a whole number of at least 1"),
        ("hidden_size", None, "a number"),
        ("rope_theta", "10000", "a number"),
        ("num_experts", "8", "a number"),
        ("rope_scaling", "yarn", "a table"),
        ("rope_parameters", [1], "a table"),
        ("layer_types", "full", "a list of names"),
        ("num_experts_per_tok", 9, "at most 8, the number of experts"),
    ],
)
def test_a_value_that_no_model_has_is_refused_by_its_key(
    key: str, value: Any, expected: str
) -> None:
    config = config_at("qwen3_moe") | {key: value}
    text = re.escape(f"says {key} is {json.dumps(value)}, which is not {expected}")
    with pytest.raises(MintError, match=text):
        check_values(config)
    if key not in ("num_experts", "hidden_size", "rope_theta", "num_experts_per_tok"):
        with pytest.raises(MintError, match=text):
            check_values({"model_type": "qwen3_vl_moe", "text_config": config})


def test_types_of_layers_may_go_on_but_not_end_early() -> None:
    config = config_at("t5/gemma3_text")
    types = config["layer_types"]
    longer = {"layer_types": [*types, "full_attention"]}
    check_values(config | longer | {"model_type": "step3p5"})
    with pytest.raises(MintError, match="lists 4 layer_types for 3 layers"):
        check_values(config | longer)  # transformers refuses it too
    with pytest.raises(MintError, match="lists 2 layer_types for 3 layers"):
        check_values(config | {"layer_types": types[:2]})


def test_why_a_model_is_not_built(make: Maker) -> None:
    for name, change, why in (
        ("beyond", {"num_hidden_layers": 1}, "config.json is of another model, or the class"),
        (
            "beside",
            {"vocab_size": 100},
            r"embed_tokens.weight: set vocab_size to 96 in config.json",
        ),
        ("lost", {"num_hidden_layers": 3}, r"layers.2.* \(is the checkpoint complete"),
    ):
        folder = make(llama(2), name)
        edit_config(folder, **change)
        with pytest.raises(MintError, match=why):
            build_model(folder)

    folder = make(qwen3_moe(1), "expert")
    edit_weights(folder, lambda w: {n: a for n, a in w.items() if "experts.2.up" not in n})
    with pytest.raises(MintError, match=r"Missing model\S+experts.2.up_proj.weight \(is the"):
        build_model(folder)
    folder = make(llama(1), "adapted")
    edit_weights(folder, lambda w: w | {"model.layers.0.lora_A.weight": mx.zeros((4, 64))})
    with pytest.raises(MintError, match="an adapter was saved with the model: merge it"):
        build_model(folder)


def test_folders_of_something_else_say_what_they_are(make: Maker) -> None:
    folder = make(llama(1), "adapter")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(MintError, match="holds an adapter of org/base, not a model: merge it"):
        load_source(str(folder))

    folder = make(llama(1), "pictures")
    (folder / "config.json").rename(folder / "model_index.json")
    with pytest.raises(MintError, match="it is of a diffusion model"):
        load_source(str(folder))

    folder = make(llama(1), "pointer")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(MintError, match="is a pointer of Git LFS"):
        load_source(str(folder))
