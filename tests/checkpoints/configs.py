"""The configs of the tiny checkpoints: those of the released models, with small numbers."""

from __future__ import annotations

from typing import Any

VOCAB, HIDDEN, HEADS, KV, HEAD_DIM, INNER, EXPERTS, LAYERS = 96, 64, 4, 2, 16, 64, 8, 2

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 2,
}
MOE = BASE | {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
YARN = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
}

# transformers' config class, what its model is called, and the config.
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", BASE),
    "mistral": ("MistralConfig", "MistralForCausalLM", BASE | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", BASE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", BASE | {"tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", BASE | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", BASE | {"tie_word_embeddings": True, "sliding_window": 32}),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        BASE | {"tie_word_embeddings": True, "sliding_window": 32, "sliding_window_pattern": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        MOE | {"shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", MOE | {"decoder_sparse_step": 1, "norm_topk_prob": True}),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        MOE
        | {
            "shared_expert_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention"],
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "decoder_sparse_step": 1,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        BASE | {"num_local_experts": EXPERTS, "intermediate_size": INNER},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", MOE | {"intermediate_size": INNER}),
    "phimoe": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        BASE | {"num_local_experts": EXPERTS, "intermediate_size": INNER, "lm_head_bias": True, "attention_bias": True},
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        BASE | {"num_local_experts": EXPERTS, "intermediate_size": INNER, "tie_word_embeddings": True},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        MOE | MLA | YARN | {"head_dim": None, "num_key_value_heads": HEADS, "topk_method": "greedy"},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MOE | MLA | YARN | {"num_key_value_heads": HEADS}),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        MOE
        | {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "dots1": (
        "Dots1Config",
        "Dots1ForCausalLM",
        MOE
        | {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        BASE
        | {
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_intermediate_size": INNER,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        BASE
        | {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": INNER,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4": (
        "Llama4Config",
        "Llama4ForConditionalGeneration",
        {
            "text_config": BASE
            | {
                "num_local_experts": EXPERTS,
                "intermediate_size": INNER,
                "intermediate_size_mlp": 128,
                "num_hidden_layers": 4,
                "interleave_moe_layer_step": 2,
                "num_experts_per_tok": 1,
                "attention_chunk_size": 64,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
                "vision_feature_layer": -1,
            },
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
}
