"""A key-value cache is as large as mlx-lm makes it."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import VOCAB
from mlx_lm.models.cache import make_prompt_cache
from released import RELEASED, known

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint import mlxlm
from mint_mlx.runtime.kvcache import PREFILL, cache_size

CONTEXT = PREFILL + 700
# Full attention, sliding windows, chunks, latents, states of a linear attention.
FAMILIES = [
    "llama",
    "gemma3_text",
    "gpt_oss_bf16",
    "llama4",
    "deepseek_v3",
    "qwen3_next",
    "qwen3_moe",
]


def config_of(family: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((RELEASED / family / "config.json").read_text())
    config.pop("quantization_config", None)
    for table in (config, config.get("text_config") or {}):
        if "sliding_window" in table:
            table["sliding_window"] = 900
    return config


def cached(config: dict[str, Any], context: int, kv_bits: int | None = None) -> int:
    return cache_size(config, context, kv_bits).bytes


@pytest.mark.parametrize("family", [f for f in FAMILIES if known(f)])
def test_the_cache_is_as_large_as_mlx_lm_makes_it(family: str) -> None:
    config = config_of(family)
    model = mlxlm.bare_model(config)
    model.eval()
    caches = make_prompt_cache(model)
    tokens = mx.array(np.random.default_rng(0).integers(0, VOCAB, (1, CONTEXT)))
    sizes = []
    for start in range(0, CONTEXT, PREFILL):
        model(tokens[:, start : start + PREFILL], cache=caches)
        mx.eval([c.state for c in caches])
        sizes.append(sum(c.nbytes for c in caches))

    # Twice as large, since MLX's CPU backend runs experts in float32 only. Windows are cut to their
    # size after a piece: what is there between pieces is less than the most that there is.
    predicted = 2 * cached(config, CONTEXT)
    assert 0.75 * predicted <= max(sizes) <= predicted
    if family in ("llama", "qwen3_moe", "deepseek_v3"):
        assert max(sizes) == predicted


def test_windows_stop_growing_and_full_attention_does_not() -> None:
    gemma, plain = config_of("gemma3_text"), config_of("llama")
    sliding = cached(gemma, 100_000) - cached(gemma, 50_000)
    full = cached(plain, 100_000) - cached(plain, 50_000)
    # Blocks, keys and values, heads, dimensions, bytes, tokens.
    assert cached(plain, 256) == 2 * 2 * 2 * 16 * 2 * 256
    assert abs(sliding - full // 2) < full // 100  # one of its two blocks has a window


def test_a_quantized_cache_costs_its_bits_and_two_numbers_a_group() -> None:
    config = config_of("llama") | {"head_dim": 64}
    whole, eight = cached(config, 4096), cached(config, 4096, kv_bits=8)
    assert eight == whole * (8 + 32 / 64) / 16


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "gemma2"])
def test_a_quantized_cache_that_mlx_lm_cannot_run_is_refused(family: str) -> None:
    """For its heads of 16 dimensions, its windows, its latents, its soft caps."""
    config = config_of(family)
    if family == "gemma2":
        config["head_dim"] = 64
    with pytest.raises(MintError, match="leave --kv-bits out"):
        cached(config, 4096, kv_bits=8)
