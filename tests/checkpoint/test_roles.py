"""Roles: what families call their layers, and what a layer's surroundings say of it."""

from __future__ import annotations

import pytest

from mint_mlx.checkpoint.roles import ROLES, TOWER, role_of


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("lm_head", "head"),
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("transformer.h.3.attn.c_attn", "attention"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "mla"),
        ("model.layers.0.linear_attn.in_proj_qkvz", "linear_attention"),
        ("model.layers.0.mlp.up_proj", "mlp"),
        ("model.layers.0.mlp.shared_experts.up_proj", "shared_expert"),
        ("model.layers.0.mlp.shared_expert_gate", "shared_expert_gate"),
        ("model.layers.0.feed_forward.router", "router"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.surprise", "other"),
    ],
)
def test_the_role_of_a_linear_layer(path: str, role: str) -> None:
    assert role in ROLES
    assert role_of(path, "linear", block_has_experts=True) == role


@pytest.mark.parametrize(
    ("leaf", "role"),
    [
        ("gate_proj", "expert_gate"),
        ("w1", "expert_gate"),
        ("up_proj", "expert_up"),
        ("w3", "expert_up"),
        ("down_proj", "expert_down"),
        ("w2", "expert_down"),
    ],
)
def test_the_role_of_a_stack_of_experts(leaf: str, role: str) -> None:
    assert role_of(f"model.layers.0.mlp.switch_mlp.{leaf}", "experts", True) == role


def test_a_gate_is_a_router_only_beside_experts() -> None:
    path = "model.layers.0.mlp.gate"
    assert role_of(path, "linear", block_has_experts=True) == "router"
    assert role_of(path, "linear", block_has_experts=False) == "mlp"


def test_an_owner_tells_mixers_of_one_name_apart() -> None:
    path = "backbone.layers.0.mixer.out_proj"
    assert role_of(path, "linear", False, owner="NemotronHMamba2Mixer") == "linear_attention"
    assert role_of(path, "linear", False, owner="NemotronHAttention") == "attention"
    assert role_of(path, "linear", False) == "mlp"


def test_a_head_inside_a_block_is_none() -> None:
    assert role_of("model.layers.0.head", "linear", False) == "other"


@pytest.mark.parametrize(
    "path", ["vision_tower.blocks.0.attn.qkv", "model.visual.merger", "aligner"]
)
def test_towers_are_known_by_name(path: str) -> None:
    assert TOWER.search(path)
    assert not TOWER.search("model.layers.0.self_attn.q_proj")
