"""Keys that a config leaves out mean what transformers' class of the family fills in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from families import config_of
from helpers import OLD_MLX_LM

from mint_mlx.base.errors import MintError
from mint_mlx.base.hf_config import text_config
from mint_mlx.checkpoint.config_keys import INSIDE, adapt, brought
from mint_mlx.checkpoint.family_defaults import DEFAULTS, SIZES_INSIDE, UNSETTLED_THETA
from mint_mlx.checkpoint.model_classes import REQUIRED, is_known, model_class
from mint_mlx.checkpoint.rope_keys import DEFAULT_THETA, THETAS
from mint_mlx.checkpoint.unread_keys import COUNTED, HARMLESS, check_keys

pytestmark = pytest.mark.skipif(OLD_MLX_LM, reason="its classes have other defaults")
# Keys that count without a word that says so, and keys that the shapes of tensors tell.
MORE = {"mup_enabled", "mamba_norm_before_gate", "time_step_limit"}
SHAPES = {
    "attention_bias",
    "moe_num_shared_experts",
    "moe_shared_expert_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts",
    "num_local_experts",
    "num_shared_experts",
}
# What a class derives itself where the key is left out, or never reads.
DERIVED = {
    ("deepseek_v2", "topk_method"),
    ("glm_moe_dsa", "rope_theta"),
    ("mistral4", "rope_interleave"),
    ("nemotron_h", "time_step_limit"),
    ("smollm3", "no_rope_layers"),
    *(("step3p5", key) for key in ("rope_theta", "partial_rotary_factors", "moe_layers_enum")),
}
# mlx-lm fails without them, or has the default of the release's own class.
OTHERS = {
    ("granitemoehybrid", "num_experts_per_tok"),
    *(("nemotron_h", key) for key in ("n_group", "topk_group", "num_experts_per_tok")),
    *(("nemotron_h", key) for key in ("norm_topk_prob", "routed_scaling_factor")),
    ("step3p5", "moe_router_scaling_factor"),
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
}


def in_transformers(family: str) -> dict[str, Any]:
    """The defaults of transformers' class of a text model, by mlx-lm's keys."""
    stated = stated_by(family)
    stated = stated.get("text_config", stated) | {"model_type": family}
    positions = stated.get("rope_parameters") or {}
    adapted = text_config(adapt(stated))
    if "full_attention" not in positions:
        apart = ("rope_theta", "partial_rotary_factor")
        stated |= {key: positions[key] for key in apart if key in positions}
        stated["rope_scaling"] = {k: v for k, v in positions.items() if k != "rope_theta"}
    return stated | adapted


def stated_by(family: str) -> dict[str, Any]:
    """What transformers' class of a family writes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return dict(CONFIG_MAPPING[family]().to_dict())


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_defaults_are_those_of_transformers(family: str) -> None:
    if family == "gemma4_unified_text":
        pytest.importorskip("transformers.models.gemma4_unified")
    theirs = in_transformers(family)
    for key, value in DEFAULTS[family].items():
        if (family, key) == ("granitemoehybrid", "position_embedding_type"):
            assert theirs[key] != "rope"  # none at all
        elif (family, key) == ("qwen3_vl_moe_text", "norm_topk_prob"):
            assert key not in stated_by(family)
        else:
            assert theirs[key] == value, key


@pytest.mark.parametrize("family", SIZES_INSIDE)
def test_sizes_that_a_table_inside_leaves_out_are_those_of_transformers(family: str) -> None:
    theirs = stated_by(family)
    assert {key: theirs[key] for key in SIZES_INSIDE[family]} == SIZES_INSIDE[family]

    # Pixtral 12B says all but the number of heads, LLaVA 1.5 next to nothing.
    text = {"model_type": family, "vocab_size": 64, "rope_theta": 1e6}
    config = {"model_type": "llava", "text_config": text}
    filled_in = SIZES_INSIDE[family] | text
    assert text_config(adapt(config)) == filled_in
    told = {change.key for change in brought(config) if change.left_out}
    assert told >= filled_in.keys() - text.keys()


@pytest.mark.parametrize(("family", "like"), [("qwen3_vl_moe", "qwen3_moe"), ("qwen3_5_moe", "")])
def test_families_that_normalize_whatever_their_config_says(family: str, like: str) -> None:
    """transformers' classes have no such key."""
    assert "norm_topk_prob" not in stated_by(f"{family}_text")
    for said in ({}, {"norm_topk_prob": False}):
        text = (config_of(like) if like else SMALL) | said | {"model_type": f"{family}_text"}
        config = {"model_type": family, "text_config": text}
        assert text_config(adapt(config)).get("norm_topk_prob", True) is True


def config_at_qwen3_moe() -> dict[str, Any]:
    config = config_of("qwen3_moe")
    del config["norm_topk_prob"]
    return config


def test_granite_s_null_for_the_type_of_positions_is_none() -> None:
    """transformers rotates where it says `rope`, and writes null where nothing was said."""
    hybrid = {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}
    for said in ({}, {"position_embedding_type": None}):
        assert adapt(hybrid | said)["position_embedding_type"] == "nope"
    assert adapt(hybrid | {"position_embedding_type": "rope"})["position_embedding_type"] == "rope"


def test_what_is_left_out_is_filled_in_and_told() -> None:
    config = SMALL | {"model_type": "qwen2"}
    assert adapt(config) == config | {"rope_theta": 10000.0}
    (change,) = brought(config)
    assert str(change) == (
        "leaves out rope_theta, which is 10000.0 in transformers and 1000000 in mlx-lm's class "
        "qwen2"
    )

    # One that the class can't do without; inside Qwen3-VL, whose class has no such key, it is yes.
    (change,) = brought(config_at_qwen3_moe())
    assert str(change).startswith("leaves out norm_topk_prob, which is false in transformers")

    # Stated by any name, in any table: nothing to fill in.
    assert brought(config | {"rope_theta": 1e6}) == ()
    assert "rope_theta" not in json.dumps(adapt(SMALL | {"model_type": "llama"}))
    assert adapt(config | {"rope_theta": None}) == config | {"rope_theta": 10000.0}
    theta = {"rope_type": "default", "rope_theta": 5e4}
    assert adapt(config | {"rope_parameters": theta})["rope_theta"] == 5e4


def test_text_models_inside_larger_ones_say_what_differs_only() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 64}
    adapted = text_config(adapt({"model_type": "gemma3", "text_config": text}))
    assert adapted["sliding_window"] == 4096

    # Nor need they say what they are.
    stated = {"model_type": "gemma3", "text_config": {"hidden_size": 64}}
    adapted = text_config(adapt(stated))
    assert adapted["sliding_window"] == 4096
    assert "model_type" not in adapted
    assert [change.left_out for change in brought(stated) if change.key == "sliding_window"] == [
        True
    ]


def test_text_models_are_taken_for_what_transformers_takes_them() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    nested = [
        family
        for family in CONFIG_MAPPING
        if is_known(family) and (reader := model_class({"model_type": family})) and reader.nested
    ]
    assert len(nested) > 10
    for family in nested:
        text = getattr(CONFIG_MAPPING[family](), "text_config", None)
        if text is not None:
            assert INSIDE.get(family, f"{family}_text") == text.model_type


def test_positions_are_filled_in_beside_what_is_said() -> None:
    text = {"model_type": "qwen3_5_text", "rope_theta": 5e6}
    adapted = text_config(adapt({"model_type": "qwen3_5", "text_config": text}))
    assert adapted["rope_parameters"] == {
        "partial_rotary_factor": 0.25,
        "rope_theta": 5e6,
        "rope_type": "default",
    }
    laguna = config_of("laguna")
    assert adapt(laguna) == laguna
    del laguna["rope_parameters"]
    assert adapt(laguna)["rope_parameters"]["full_attention"]["partial_rotary_factor"] == 0.5


def test_half_a_head_that_the_class_rotates_whole_is_refused_where_it_is_left_out_too() -> None:
    config = SMALL | {"model_type": "glm", "head_dim": 16}
    with pytest.raises(MintError, match=r"partial_rotary_factor is 0\.5, .* class glm"):
        check_keys(adapt(config))
    check_keys(adapt(config | {"partial_rotary_factor": 1.0}))


def test_a_router_of_nemotron_h_normalizes_where_there_is_one() -> None:
    config = config_of("nemotron_h")
    del config["norm_topk_prob"]
    assert adapt(config)["norm_topk_prob"] is True
    del config["n_routed_experts"]
    assert "norm_topk_prob" not in adapt(config)


def test_a_theta_that_versions_of_transformers_differ_in_is_asked_for() -> None:
    with pytest.raises(MintError, match="no rope_theta"):
        adapt(SMALL | {"model_type": "cohere"})
    adapt(SMALL | {"model_type": "cohere", "rope_theta": 8e6})


def test_no_other_default_differs() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    differ = set()
    for family in CONFIG_MAPPING:
        reader = model_class({"model_type": family}) if is_known(family) else None
        if reader is None or reader.nested or family in UNSETTLED_THETA:
            continue
        theirs = in_transformers(family)
        differ |= {
            (family, key)
            for key, value in reader.defaults.items()
            if (COUNTED.search(key) or key in MORE)
            and key not in HARMLESS | SHAPES
            and value is not REQUIRED
            and theirs.get(key, value) not in (value, None)
            and key not in DEFAULTS.get(family, {})
        }
    assert sorted(differ - DERIVED - OTHERS) == []


def test_thetas_that_nobody_states_are_those_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    seen = {}
    for family in filter(is_known, CONFIG_MAPPING):
        theta = getattr(type(CONFIG_MAPPING[family]().get_text_config()), "default_theta", None)
        theta = theta["global"] if isinstance(theta, dict) else theta
        if theta not in (None, DEFAULT_THETA):
            seen[family.removesuffix("_text")] = theta
    assert seen == THETAS
