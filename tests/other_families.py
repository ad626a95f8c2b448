"""What a tiny config needs of families of mlx-lm that neither transformers nor `families` has."""

from __future__ import annotations

from typing import Any

LOCAL = ["sliding_attention", "full_attention"] * 2
THETAS = {kind: {"rope_theta": 1e4} for kind in LOCAL}
LONGCAT = {
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 8,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
MINICPM = {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 2.0}

OTHERS: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"sliding_window_layers": [1], "conv_window": 2},
    "gear": {"layer_types": LOCAL},
    "iquestloopcoder": {},
    "internlm2": {},
    "lille-130m": {"block_size": 128, "n_embd": 64, "n_head": 4, "n_kv_heads": 2, "n_layer": 2},
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 1, 1, 0],
        "use_qk_norm": True,
    },
    "longcat_flash_ngram": LONGCAT | {"ngram_vocab_size_ratio": 2},
    "mimo": {"num_nextn_predict_layers": 1},
    "minicpm": MINICPM,
    "muse_glimmer": {"layer_types": LOCAL, "rope_parameters": {"rope_theta": 1e4}},
    "nemotron-nas": {
        "num_hidden_layers": 2,
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 2,
    },
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5,
    },
    "plamo": {},
    "plamo2": {"hidden_size_per_head": 16, "mamba_num_heads": 4},
    "plamo3": {},
    "qwen": {},
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "spark2_5": {"hidden_act": "gelu", "layer_types": LOCAL, "rope_parameters": THETAS},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {},
}
# Those that keep their text model's config in a table, with its type.
OTHERS_NESTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"sliding_window_pattern": 2}),
    "gemma4": (
        "gemma4_text",
        {
            "layer_types": LOCAL,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "final_logit_softcapping": 30.0,
        },
    ),
    "kimi_k25": ("kimi_k2", {}),
    "kimi_vl": ("deepseek_v3", {}),
    "lfm2-vl": (
        "lfm2",
        {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 64,
            "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"] * 2,
        },
    ),
    "mistral3": ("mistral", {}),
    "pixtral": ("llama", {}),
    "qwen2_vl": ("qwen2_vl_text", {}),
    "qwen3_vl": ("qwen3_vl_text", {}),
}
