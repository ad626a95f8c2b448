"""The guard for keys that mlx-lm's class drops: what counts is refused, what doesn't is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import FAMILIES, NESTED, SCALED, UNCHAINED, config_of
from helpers import OLD_MLX_LM, Cli, Maker, edit_config, llama, qwen3_moe
from released import REFUSED

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.config_keys import adapt
from mint_mlx.checkpoint.unread_keys import check_keys, unread_keys
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.doctor import doctor

FIXTURES = Path(__file__).parent.parent / "fixtures"
pytestmark = pytest.mark.skipif(OLD_MLX_LM, reason="its classes read fewer keys")


def config_at(name: str) -> dict[str, Any]:
    return dict(json.loads((FIXTURES / name / "config.json").read_text()))


def unread(config: dict[str, Any]) -> list[str]:
    return [str(key) for key in unread_keys(adapt(config))]


def test_no_family_is_refused() -> None:
    names = [path.parent for path in FIXTURES.rglob("config.json")]
    names = [folder for folder in names if folder.name not in REFUSED]
    assert len(names) > 60
    for folder in names:
        assert unread(config_at(str(folder))) == [], folder
    for family in [*FAMILIES, *NESTED, *UNCHAINED, *SCALED, "dbrx"]:
        assert unread(config_of(family)) == [], family


RENAMED: dict[str, tuple[str, str]] = {
    "rope_parameters": ("rotary_parameters", "t5/llama"),
    "rope_theta": ("rotary_base", "llama"),
    "rope_scaling": ("position_scaling", "deepseek_v3"),
    "num_experts": ("n_moe_experts", "qwen3_moe"),
    "num_local_experts": ("expert_count", "t5/qwen3_moe"),
    "num_experts_per_tok": ("router_topk", "qwen3_moe"),
    "routed_scaling_factor": ("routed_multiplier", "deepseek_v3"),
    "rms_norm_eps": ("norm_epsilon", "llama"),
    "query_pre_attn_scalar": ("attention_scale", "gemma2"),
}


@pytest.mark.parametrize("key", RENAMED)
def test_the_next_rename_is_noticed(key: str) -> None:
    name, fixture = RENAMED[key]
    config = config_at(fixture)
    config[name] = config.pop(key)
    if config[name] in (None, 1.0):  # says nothing that the class doesn't do
        config[name] = 2.5
    assert any(text.startswith(f"{name} is ") for text in unread(config))

    # The same in the table of a text model.
    nested = {"model_type": "mistral3", "text_config": config}
    if fixture == "t5/llama":
        assert unread(nested)


def test_the_refusal_names_key_value_and_class(make: Maker, tmp_path: Path, cli: Cli) -> None:
    folder = make(llama(2))
    edit_config(folder, rotary_base=77.0)
    sentence = r"rotary_base is 77.0, which mlx-lm's class llama does not read"
    with pytest.raises(MintError, match=sentence):
        convert(str(folder), "6bpw", tmp_path / "out")
    with pytest.raises(MintError, match=sentence):
        evaluate(str(folder))
    assert list(tmp_path.glob("*out*")) == []
    assert cli("inspect", folder).code == 1

    # The doctor goes on.
    assert any(sentence.partition(",")[0] in f.problem for f in doctor(str(folder)).findings)


@pytest.mark.parametrize(
    "key",
    [
        "max_position_embeddings",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "output_router_logits",
        "initializer_range",
        "attention_dropout",
        "max_window_layers",
        "bos_token_id",
        "pretraining_tp",
        "moe_layers",
    ],
)
def test_keys_that_compute_nothing_are_passed_over(key: str) -> None:
    assert unread(config_at("qwen3_moe") | {key: 7}) == []
    assert unread(config_at("gemma2") | {key: 7}) == []


def test_values_that_say_what_the_class_does_are_passed_over() -> None:
    for change in (
        {"rope_interleave": True, "n_group": 1, "attn_logit_softcapping": None},
        {"attention_bias": False, "partial_rotary_factor": 1.0, "qk_norm": False},
        {"rope_scaling": {"rope_type": "default"}, "num_local_experts": 8},
    ):
        assert unread(config_at("mixtral") | change) == []
    assert unread(config_at("mixtral") | {"rope_interleave": False})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def positions(name: str, **parameters: Any) -> dict[str, Any]:
    """A twin with other positions."""
    return config_at(f"t5/{name}") | {"rope_parameters": {"rope_theta": 5.0} | parameters}


def test_positions_that_a_class_can_not_do_are_refused() -> None:
    for name in ("qwen3_moe", "mixtral", "glm4_moe", "qwen2_moe", "gemma", "lfm2", "starcoder2"):
        assert unread(positions(name, **YARN)), name
    assert "rope_parameters.rope_type" in unread(positions("qwen3_moe", **YARN))[0]
    assert unread(positions("phi3", **YARN))
    assert unread(positions("llama", partial_rotary_factor=0.5))
    assert not unread(positions("llama", **YARN))

    # A stated factor is one that follows, or another one.
    assert not unread(positions("llama", **YARN, attention_factor=1.1386294361119891))
    assert unread(positions("llama", **YARN, attention_factor=1.0))

    # transformers goes by both of these or by neither, mlx-lm by each of them.
    assert not unread(positions("llama", **YARN, mscale=0.7, mscale_all_dim=0.7))
    assert not unread(positions("llama", **YARN, mscale=1.0))
    assert unread(positions("llama", **YARN, mscale=0.5))
    assert unread(positions("llama", **YARN, mscale_all_dim=1.0))

    # Sliding windows have a theta of their own where the class has a place for it.
    apart = {
        "full_attention": {"rope_theta": 5.0},
        "sliding_attention": {"rope_theta": 7.0},
    }
    assert unread(config_at("t5/olmo3") | {"rope_parameters": apart})
    assert not unread(config_at("t5/gemma3_text") | {"rope_parameters": apart})
    apart["sliding_attention"] = {"rope_theta": 7.0} | YARN
    assert unread(config_at("t5/gemma3_text") | {"rope_parameters": apart})


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 8.0} | {
    key: [2.5] * 8 for key in ("short_factor", "long_factor")
}


def test_scalings_that_were_seen_to_compute_other_positions_are_refused() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    assert unread(positions("deepseek_v2", **linear))
    assert not unread(positions("deepseek_v2", **YARN))
    for family in ("deepseek_v3", "llama4_text"):  # neighbouring channels are rotated
        assert unread(positions(family, **LONGROPE))
    assert unread(positions("qwen3_next", rope_type="proportional", partial_rotary_factor=0.5))

    # A class that reads `rope_parameters` needn't do all that they say, nor in every layer.
    for kind in ("full_attention", "sliding_attention"):
        mellum = config_at("drawn_5/mellum")
        tables = mellum["rope_parameters"]
        scaled = tables | {kind: tables[kind] | linear}
        assert unread(mellum | {"rope_parameters": scaled}), kind
    laguna = config_at("drawn_5/laguna")
    tables = laguna["rope_parameters"]
    windows = tables["sliding_attention"] | YARN | {"attention_factor": 1.5}
    assert unread(laguna | {"rope_parameters": tables | {"sliding_attention": windows}})

    # mlx-lm takes longrope's factor on queries and keys from the two lengths.
    assert not unread(positions("llama", **LONGROPE))
    assert unread(positions("llama", **(LONGROPE | {"factor": 4.0})))
    assert unread(positions("llama", **LONGROPE, attention_factor=1.3))


def test_a_scaling_of_transformers_4_that_the_class_ignores_is_refused(make: Maker) -> None:
    folder = make(qwen3_moe(1))
    edit_config(folder, rope_scaling=YARN)
    with pytest.raises(MintError, match=r"rope_scaling.rope_type is \"yarn\".*qwen3_moe"):
        convert(str(folder), uniform="4bit-g64")


def test_types_of_layers_without_a_period_are_refused() -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert unread(config_at("t5/gemma3_text") | {"layer_types": types})
    assert not unread(config_at("t5/exaone4") | {"layer_types": types})
    assert not unread(config_at("t5/qwen2") | {"layer_types": types})
    assert unread(config_at("t5/cohere2") | {"layer_types": ["sliding_attention"] * 2})
    llama4 = config_at("t5/llama4_text")
    assert unread(llama4) == []
    assert unread(llama4 | {"layer_types": llama4["layer_types"][::-1]})


def test_types_of_layers_count_more_than_a_period_beside_them() -> None:
    exaone = config_at("t5/exaone4") | {"layer_types": ["full_attention"] * 2}
    assert adapt(exaone)["sliding_window_pattern"] == "GG"
    assert adapt(exaone | {"sliding_window": None})["sliding_window_pattern"] is None
    assert unread(config_at("drawn_5/exaone_moe") | {"layer_types": ["full_attention"] * 2})


def test_what_a_class_reads_without_going_by_it_counts_too() -> None:
    assert unread(config_at("t5/deepseek_v3") | {"scoring_func": "softmax"})
    assert not unread(config_at("t5/deepseek_v3") | {"scoring_func": "sigmoid"})
    assert unread(config_at("t5/qwen2_moe") | {"norm_topk_prob": True})
    with pytest.raises(MintError, match="norm_topk_prob is true"):
        check_keys(adapt(config_at("t5/qwen2_moe") | {"norm_topk_prob": True}))


@pytest.mark.parametrize(
    ("fixture", "key", "does", "other"),
    [
        ("qwen3_moe", "scoring_func", "softmax", "sigmoid"),
        ("qwen3_moe", "topk_method", "greedy", "noaux_tc"),
        ("mixtral", "norm_topk_prob", True, False),
        ("mixtral", "score_function", "softmax", "sigmoid"),
        ("gpt_oss", "moe_renormalize", True, False),
        ("deepseek_v2", "topk_method", "group_limited_greedy", "noaux_tc"),
        ("t5/minimax_m2", "norm_topk_prob", True, False),
        ("phimoe", "scoring_func", None, "softmax"),
    ],
)
def test_what_a_router_does_by_itself_is_known(
    fixture: str, key: str, does: Any, other: Any
) -> None:
    assert unread(config_at(fixture) | {key: does}) == []
    assert [text.partition(" ")[0] for text in unread(config_at(fixture) | {key: other})] == [key]


def test_a_router_key_of_a_model_without_experts_says_nothing() -> None:
    assert unread(config_at("qwen3") | {"norm_topk_prob": True, "scoring_func": "sigmoid"}) == []


def test_the_two_forms_of_gelu_differ_by_less_than_a_rounding() -> None:
    normal = np.random.RandomState(0).randn(20_000)
    for scale in (0.25, 0.5, 1, 2, 4):
        inputs = mx.array((scale * normal).astype(np.float32))
        exact, by_tanh = np.array(nn.gelu(inputs)), np.array(nn.gelu_approx(inputs))
        assert np.linalg.norm(exact - by_tanh) < 2.5e-4 * np.linalg.norm(exact)
    assert unread(config_at("t5/gpt_neox") | {"hidden_act": "gelu"}) == []


def test_an_indexer_that_takes_the_choice_of_another_layer_is_refused() -> None:
    config = config_at("drawn_5/glm_moe_dsa")
    assert unread(config) == []
    assert "indexer_types" in unread(config | {"indexer_types": ["full", "shared"]})[0]


@pytest.mark.parametrize(
    ("fixture", "key", "other"),
    [
        ("mixtral", "hidden_act", "gelu"),
        ("t5/olmoe", "hidden_act", "relu"),
        ("t5/smollm3", "hidden_act", "gelu_pytorch_tanh"),
        ("t5/nemotron", "hidden_act", "relu"),
        ("drawn_5/nanochat", "hidden_act", "gelu"),
        ("drawn_5/nemotron_h", "mlp_hidden_act", "silu"),
        ("drawn_5/nemotron_h", "mamba_hidden_act", "gelu"),
        ("drawn_5/gpt2", "scale_attn_weights", False),
        ("drawn_5/gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("drawn_5/minimax_m3_vl_text", "rotary_dim", 12),
    ],
)
def test_what_was_seen_to_compute_another_model_in_transformers_is_refused(
    fixture: str, key: str, other: Any
) -> None:
    config = config_at(fixture)
    assert unread(config) == []
    assert unread(config | {key: other})


def test_a_share_and_a_power_of_their_own_are_refused() -> None:
    mimo = config_at("drawn_5/mimo_v2_flash")
    windows = mimo["rope_parameters"]["sliding_attention"] | {"partial_rotary_factor": 0.75}
    apart = {"rope_parameters": mimo["rope_parameters"] | {"sliding_attention": windows}}
    assert "sliding_attention.partial_rotary_factor" in unread(mimo | apart)[0]

    dbrx = config_at("drawn_5/dbrx")
    assert unread(dbrx) == []
    for power in (2.0, None):
        experts = dbrx["ffn_config"] | {"moe_normalize_expert_weights": power}
        assert "moe_normalize_expert_weights" in unread(dbrx | {"ffn_config": experts})[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_act", "quick_gelu"),
        ("hidden_act", "tanh"),
        ("use_bidirectional_attention", True),
        ("is_causal", False),
    ],
)
def test_another_function_between_products_and_attention_both_ways_are_refused(
    key: str, value: object
) -> None:
    config = config_at("llama")
    check_keys(adapt(config))
    with pytest.raises(MintError, match=rf"{key} is .* class llama does not read"):
        check_keys(adapt(config | {key: value}))
