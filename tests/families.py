"""A tiny config for every family of mlx-lm that has routed experts, and for some others."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from helpers import VOCAB, write_tokenizer
from mlx.utils import tree_flatten
from other_families import OTHERS, OTHERS_NESTED

from mint_mlx.checkpoint.model_classes import model_class, text_class

# What most families call alike; a family takes what its ModelArgs names.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_local_experts": 8,
    "num_shared_experts": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "qk_head_dim": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "layer_norm_eps": 1e-5,
    "sliding_window": 32,
    "scoring_func": "sigmoid",
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "bias": False,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
    "shared_intermediate_size": 32,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "hidden_act": "silu",
    "rope_scaling": None,
    "moe_num_experts": 8,
    "moe_k": 2,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
YARN = {
    "type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
KINDS = ("sliding_attention", "full_attention")
MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2}

# What a family needs besides.
FAMILIES: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afmoe": {"layer_types": SLIDING, "route_scale": 2.826, "mup_enabled": True},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_v3": {},
    "deepseek": {},
    "deepseek_v2": {
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "topk_method": "greedy",
    },
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v41": {
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 16,
    },
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {"layer_types": SLIDING, "is_moe_layer": [False, True, True, True]},
    "glm4_moe": {"use_qk_norm": True},
    "glm4_moe_lite": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "layer_types": SLIDING,
        "sliding_window_pattern": 2,
        "global_head_dim": 16,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 30.0,
    },
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
        **MAMBA,
        "mamba_expand": 1,
        "position_embedding_type": "rope",
        "time_step_limit": [0.001, 100.0],
    },
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": False,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        **MAMBA,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "full_attn_layers": [3, 4],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 128,
        "num_experts_per_token": 2,
    },
    "laguna": {"rope_parameters": {kind: {"rope_theta": 1e4} for kind in KINDS}},
    "lfm2_moe": {
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 96,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 8,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mellum": {
        "layer_types": SLIDING,
        "rope_parameters": {kind: {"rope_theta": 1e4} for kind in KINDS},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 32,
        "attention_value_scale": 0.707,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "v_head_dim": 16,
        "moe_layer_freq": [0, 1, 1, 1],
    },
    "minimax": {"rotary_dim": 16},
    "mistral4": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "rope_theta": 1e4}},
    "mixtral": {},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "layer_norm_epsilon": 1e-5,
        "use_conv_bias": True,
        "hybrid_override_pattern": "ME*E",
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmoe": {},
    "phimoe": {},
    "phixtral": {
        "num_vocab": VOCAB,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 4,
        "rotary_dim": 16,
    },
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "step3p5": {"num_attention_groups": 2, "moe_top_k": 2},
}


# Families that keep their language model's config in a table of its own.
NESTED: dict[str, dict[str, Any]] = {
    "kimi_k3": {
        "hidden_act": "situ",
        "activation_situ_beta": 4.0,
        "attn_res_block_size": 2,
        "num_experts_per_token": 2,
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "gate_lower_bound": -5.0,
        },
    },
    "muse_spark": {
        "post_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "layer_rope_theta": [1e4] * 4,
        "layer_types": SLIDING,
        "final_logit_softcapping": 30.0,
        "output_multiplier": 1.0,
        "moe_hidden_size": 64,
        "num_shared_experts": 0,
    },
    "llama4": {
        "attention_chunk_size": 32,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "use_qk_norm": True,
        "num_experts_per_tok": 1,
    },
    "minimax_m3_vl": {"rotary_dim": 16, "moe_layer_freq": [0, 1, 1, 1]},
    "qwen3_5_moe": {
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "type": "default"}
    },
    "qwen3_vl_moe": {},
}


SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128, "layer_norm_epsilon": 1e-5}
# Dense families whose blocks form no chain: of these one calls its blocks by keyword, two add
# positions, one needs Metal, one runs twice, two share their caches.
UNCHAINED: dict[str, dict[str, Any]] = {
    "gptj": SMALL | {"rotary_dim": 16},
    "gpt2": SMALL | {"n_ctx": 128},
    "gpt_bigcode": SMALL | {"n_inner": 128},
    "bitnet": {},
    "nanbeige": {"num_loops": 2},
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
}
# Dense families that scale what they compute outside of their layers.
SCALED: dict[str, dict[str, Any]] = {
    "falcon_h1": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 64,
        "mamba_d_head": 16,
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
        "num_attention_heads": 4,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "attention_out_multiplier": 0.9375,
        "key_multiplier": 0.390625,
        "lm_head_multiplier": 0.0390625,
        "mamba_norm_before_gate": False,
        "mlp_multipliers": [0.88, 0.586],
        "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.354, 0.25, 0.354, 0.5, 0.354],
        "ssm_out_multiplier": 0.236,
    },
    "cohere2": {"sliding_window_pattern": 2, "logit_scale": 1.0},
}


DBRX = {
    "d_model": 64,
    "n_layers": 5,
    "n_heads": 4,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}


def config_of(family: str) -> dict[str, Any]:
    """The family's tiny config.json."""
    if family in NESTED or family in OTHERS_NESTED:
        text_type, more = OTHERS_NESTED.get(family) or (f"{family}_text", NESTED[family])
        config = {"model_type": family, "text_config": {"model_type": text_type}}
        outer, reader = model_class(config), text_class(config)
        assert outer is not None and reader is not None, family
        common = {key: value for key, value in COMMON.items() if key in reader.keys}
        size = {"vocab_size": VOCAB} if "vocab_size" in outer.keys else {}
        return config | size | {"text_config": common | more | {"model_type": text_type}}
    module = importlib.import_module(f"mlx_lm.models.{family}")
    names = {field.name for field in dataclasses.fields(module.ModelArgs)}
    common = {k: v for k, v in COMMON.items() if k in names}
    special = (FAMILIES | UNCHAINED | SCALED | OTHERS | {"dbrx": DBRX})[family]
    return common | special | {"model_type": family}


def write_family(folder: Path, family: str, **more: Any) -> Path:
    """A random checkpoint of a family, in mlx-lm's own names; `more` goes into its config."""
    folder.mkdir(parents=True)
    config = config_of(family) | more
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    write_tokenizer(folder)
    return folder
