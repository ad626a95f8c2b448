"""Kimi-VL's keys and values are split as DeepSeek-V3's own class splits them."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
from mlx_lm.models import deepseek_v3

from mint_mlx.converters.sources.kimi_vl import split_latent

SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "qk_nope_head_dim": 8,
    "v_head_dim": 4,
    "kv_lora_rank": 16,
    "n_routed_experts": 2,
}
NAME = "model.layers.{}.self_attn.kv_b_proj.weight"


def test_both_halves_are_those_of_deepseek_v3() -> None:
    whole = {NAME.format(n): mx.random.normal((36, 16), key=mx.random.key(n)) for n in range(2)}
    model = SimpleNamespace(args=SimpleNamespace(**SIZES))
    expected = deepseek_v3.Model.sanitize(model, dict(whole))

    inside = {f"language_model.{name}": array for name, array in whole.items()}
    config = {"model_type": "kimi_vl", "text_config": SIZES}
    split = split_latent(config, inside | {"language_model.lm_head.weight": mx.ones((2, 2))})
    assert split.pop("language_model.lm_head.weight").shape == (2, 2)
    assert split.keys() == {f"language_model.{name}" for name in expected}
    for name, array in expected.items():
        assert mx.array_equal(split[f"language_model.{name}"], array)


def test_other_families_keep_their_tensors() -> None:
    weights = {NAME.format(0): mx.ones((36, 16))}
    assert split_latent({"model_type": "deepseek_v3"}, weights) is weights
