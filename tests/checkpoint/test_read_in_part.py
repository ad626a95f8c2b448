"""Values that mlx-lm's classes read and don't go by everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.config_keys import adapt
from mint_mlx.checkpoint.unread_keys import check_keys

Table = dict[str, Any]
FIXTURES = Path(__file__).parents[1] / "fixtures"
FALCON: Table = {
    "model_type": "falcon_h1",
    "rope_theta": 1e4,
    "key_multiplier": 0.5,
    "ssm_multipliers": [1.0] * 5,
}
GRANITE: Table = {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}


@pytest.mark.parametrize(
    ("config", "key", "wrong", "right"),
    [
        ({"model_type": "mamba2"}, "n_groups", 8, 1),
        (GRANITE, "mamba_n_groups", 2, 1),
        (GRANITE, "position_embedding_type", "alibi", "nope"),
        (FALCON | {"mamba_rms_norm": True}, "mamba_n_groups", 2, 1),
        ({"model_type": "gpt_bigcode", "n_embd": 8}, "multi_query", False, True),
        (FALCON, "mlp_bias", True, False),
        (FALCON, "projectors_bias", True, False),
    ],
)
def test_what_a_class_does_not_go_by_is_refused(
    config: Table, key: str, wrong: object, right: object
) -> None:
    check_keys(adapt(config | {key: right}))
    with pytest.raises(MintError, match=f"{key} is .* does not go by everywhere, .*: wait for"):
        check_keys(adapt(config | {key: wrong}))


@pytest.mark.parametrize(
    "config",
    [
        GRANITE | {"mamba_n_groups": 2, "layer_types": ["attention"]},
        FALCON | {"mamba_n_groups": 2, "mamba_rms_norm": False},
        FALCON | {"key_multiplier": 1.0, "attention_bias": True},
    ],
)
def test_what_makes_no_difference_is_read(config: Table) -> None:
    check_keys(adapt(config))


def test_gpt_bigcode_s_width_is_four_times_the_model_s() -> None:
    config = {"model_type": "gpt_bigcode", "n_embd": 24, "multi_query": True}
    assert adapt(config | {"n_inner": None})["n_inner"] == 96
    assert adapt(config | {"n_inner": 7})["n_inner"] == 7


def test_deepseek_v2_needs_no_table_of_scaling() -> None:
    """Of transformers 4 as of 5: the class can't do without one."""
    config = {"model_type": "deepseek_v2", "max_position_embeddings": 64}
    for said in ({}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}):
        assert adapt(config | said)["rope_scaling"]["factor"] == 1.0


@pytest.mark.parametrize("kind", ["full_attention", "linear_attention"])
def test_qwen3_5_needs_layers_of_both_kinds(kind: str) -> None:
    """mlx-lm's class adds 1 to norms only beside linear attention, and fails without full."""
    config = json.loads((FIXTURES / "qwen3_5_moe" / "config.json").read_text())
    check_keys(adapt(config))
    count = config["text_config"]["num_hidden_layers"]
    config["text_config"]["layer_types"] = [kind] * count
    with pytest.raises(MintError, match="layer_types is"):
        check_keys(adapt(config))
