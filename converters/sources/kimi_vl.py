"""Splits what mlx-lm's class for Kimi-VL holds in two: keys and values from latent vectors.

Its text model is DeepSeek-V3's, whose own class splits `kv_b_proj` as it loads. The class for
Kimi-VL (mlx-lm 0.32) takes only tensors that were split before, so not those of the release.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...base.hf_config import text_config

WHOLE = ".kv_b_proj.weight"


def split_latent(config: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors with `embed_q` and `unembed_out` in place of each 16-bit `kv_b_proj`.

    Args:
        config: of the checkpoint; another family's tensors are left as they are.
        weights: by name; a `kv_b_proj` is (heads x (keys + values), latent).

    Returns:
        By name; `embed_q` (heads, latent, keys) and `unembed_out` (heads, values, latent).
    """
    if config.get("model_type") != "kimi_vl":
        return weights
    text = text_config(config)
    keys, heads = text["qk_nope_head_dim"], text["num_attention_heads"]
    tensors = {}
    for name, array in weights.items():
        base = name.removesuffix(WHOLE)
        if base == name or f"{base}.kv_b_proj.scales" in weights:
            tensors[name] = array
            continue
        by_head = array.reshape(heads, -1, array.shape[-1])
        tensors[f"{base}.embed_q.weight"] = mx.contiguous(by_head[:, :keys].swapaxes(-1, -2))
        tensors[f"{base}.unembed_out.weight"] = mx.contiguous(by_head[:, keys:])
    return tensors
