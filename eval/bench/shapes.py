"""Released models' true shapes: config.json, and each tensor's name and shape.

They are those of each model's config.json and index on the Hub, for any number of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FP8_BLOCK = 128
Shapes = dict[str, tuple[int, ...]]
Model = tuple[dict[str, Any], Shapes]


def _ends(hidden: int, vocabulary: int, prefix: str = "model") -> Shapes:
    return {
        f"{prefix}.embed_tokens.weight": (vocabulary, hidden),
        f"{prefix}.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def _attention(block: str, hidden: int, queries: int, keys: int, bias: bool = False) -> Shapes:
    sizes = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
    }
    shapes: Shapes = {f"{block}.self_attn.{n}_proj.weight": size for n, size in sizes.items()}
    if bias:
        shapes |= {f"{block}.self_attn.{n}_proj.bias": size[:1] for n, size in sizes.items()}
    return shapes | {
        f"{block}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")
    }


def _mlp(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def qwen3_30b(layers: int) -> Model:
    """Qwen/Qwen3-30B-A3B: one file entry an expert."""
    hidden, vocabulary, experts, inner = 2048, 151_936, 128, 768
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 6144,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
        "vocab_size": vocabulary,
    }

    # Embedding, norm and head; then layer by layer.
    shapes = _ends(hidden, vocabulary)
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= _attention(block, hidden, 32 * 128, 4 * 128)
        shapes |= {f"{block}.self_attn.{n}_norm.weight": (128,) for n in ("q", "k")}
        shapes[f"{block}.mlp.gate.weight"] = (experts, hidden)
        for e in range(experts):
            shapes |= _mlp(f"{block}.mlp.experts.{e}", hidden, inner)
    return config, shapes


def mixtral(layers: int) -> Model:
    """mistralai/Mixtral-8x7B-v0.1."""
    hidden, vocabulary, inner = 4096, 32_000, 14_336
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
        "vocab_size": vocabulary,
    }

    # Embedding, norm and head; then layer by layer.
    shapes = _ends(hidden, vocabulary)
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= _attention(block, hidden, 4096, 1024)
        shapes[f"{block}.block_sparse_moe.gate.weight"] = (8, hidden)
        for e in range(8):
            expert = f"{block}.block_sparse_moe.experts.{e}"
            shapes |= {
                f"{expert}.w1.weight": (inner, hidden),
                f"{expert}.w3.weight": (inner, hidden),
            }
            shapes[f"{expert}.w2.weight"] = (hidden, inner)
    return config, shapes


def deepseek_v3(layers: int) -> Model:
    """deepseek-ai/DeepSeek-V3 in bf16; its first layer is dense, but a single layer has experts."""
    hidden, vocabulary, experts, heads = 7168, 129_280, 256, 128
    dense = 1 if layers > 1 else 0
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": layers,
        "first_k_dense_replace": dense,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_layer_freq": 1,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 163_840,
        "attention_bias": False,
        "vocab_size": vocabulary,
    }

    # Embedding, norm and head; then layer by layer.
    shapes = _ends(hidden, vocabulary)
    for i in range(layers):
        block = f"model.layers.{i}"
        attention = f"{block}.self_attn"
        shapes |= {
            f"{attention}.q_a_proj.weight": (1536, hidden),
            f"{attention}.q_a_layernorm.weight": (1536,),
            f"{attention}.q_b_proj.weight": (heads * 192, 1536),
            f"{attention}.kv_a_proj_with_mqa.weight": (576, hidden),
            f"{attention}.kv_a_layernorm.weight": (512,),
            f"{attention}.kv_b_proj.weight": (heads * 256, 512),
            f"{attention}.o_proj.weight": (hidden, heads * 128),
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
        }
        if i < dense:
            shapes |= _mlp(f"{block}.mlp", hidden, 18_432)
            continue
        shapes |= {
            f"{block}.mlp.gate.weight": (experts, hidden),
            f"{block}.mlp.gate.e_score_correction_bias": (256,),
        }
        shapes |= _mlp(f"{block}.mlp.shared_experts", hidden, 2048)
        for e in range(experts):
            shapes |= _mlp(f"{block}.mlp.experts.{e}", hidden, 2048)
    return config, shapes


def deepseek_v3_fp8(layers: int) -> Model:
    """deepseek-ai/DeepSeek-V3 as released: FP8 in blocks of 128x128 with a float32 scale each."""
    config, shapes = deepseek_v3(layers)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    with_scales: Shapes = {}
    for name, shape in shapes.items():
        with_scales[name] = shape
        if name.endswith(("_proj.weight", "_mqa.weight")):
            with_scales[f"{name}_scale_inv"] = tuple(-(-n // FP8_BLOCK) for n in shape)
    return config, with_scales


def qwen3_5_35b(layers: int) -> Model:
    """The language model of Qwen/Qwen3.5-35B-A3B.

    Three of four layers have linear attention; experts are fused.
    """
    hidden, vocabulary, experts, inner = 2048, 248_320, 256, 512
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    text = {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "layer_types": kinds,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "attn_output_gate": True,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "mlp_only_layers": [],
        "max_position_embeddings": 262_144,
        "vocab_size": vocabulary,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": text,
    }

    # The tower's tensors aren't made.
    prefix = "model.language_model"
    shapes = _ends(hidden, vocabulary, prefix)
    for i, kind in enumerate(kinds):
        block = f"{prefix}.layers.{i}"
        shapes |= {f"{block}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        if kind == "full_attention":
            shapes |= _attention(block, hidden, 2 * 16 * 256, 2 * 256)
            shapes[f"{block}.self_attn.o_proj.weight"] = (hidden, 16 * 256)
            shapes |= {f"{block}.self_attn.{n}_norm.weight": (256,) for n in ("q", "k")}
        else:
            linear = f"{block}.linear_attn"
            shapes |= {
                f"{linear}.in_proj_qkv.weight": (8192, hidden),
                f"{linear}.in_proj_z.weight": (4096, hidden),
                f"{linear}.in_proj_a.weight": (32, hidden),
                f"{linear}.in_proj_b.weight": (32, hidden),
                f"{linear}.conv1d.weight": (8192, 1, 4),
                f"{linear}.A_log": (32,),
                f"{linear}.dt_bias": (32,),
                f"{linear}.norm.weight": (128,),
                f"{linear}.out_proj.weight": (hidden, 4096),
            }
        shapes |= {
            f"{block}.mlp.gate.weight": (experts, hidden),
            f"{block}.mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
            f"{block}.mlp.experts.down_proj": (experts, hidden, inner),
            f"{block}.mlp.shared_expert_gate.weight": (1, hidden),
        }
        shapes |= _mlp(f"{block}.mlp.shared_expert", hidden, inner)
    return config, shapes


def gpt_oss_20b(layers: int) -> Model:
    """openai/gpt-oss-20b: experts in MXFP4."""
    hidden, vocabulary, experts, inner = 2880, 201_088, 32, 2880
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": [
            "sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)
        ],
        "rope_theta": 150_000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "attention_bias": True,
        "max_position_embeddings": 131_072,
        "vocab_size": vocabulary,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }

    # Embedding, norm and head; then layer by layer.
    shapes = _ends(hidden, vocabulary)
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= _attention(block, hidden, 64 * 64, 8 * 64, bias=True)
        shapes |= {
            f"{block}.self_attn.sinks": (64,),
            f"{block}.mlp.router.weight": (experts, hidden),
            f"{block}.mlp.router.bias": (experts,),
        }
        for name, rows in (("gate_up_proj", 2 * inner), ("down_proj", hidden)):
            expert = f"{block}.mlp.experts.{name}"
            shapes |= {
                f"{expert}_blocks": (experts, rows, inner // 32, 16),
                f"{expert}_scales": (experts, rows, inner // 32),
                f"{expert}_bias": (experts, rows),
            }
    return config, shapes


# Each with the number of layers that the released model has.
SHAPES: dict[str, tuple[Callable[[int], Model], int]] = {
    "qwen3-30b-a3b": (qwen3_30b, 48),
    "mixtral-8x7b": (mixtral, 32),
    "deepseek-v3": (deepseek_v3, 61),
    "deepseek-v3-fp8": (deepseek_v3_fp8, 61),
    "qwen3.5-35b-a3b": (qwen3_5_35b, 40),
    "gpt-oss-20b": (gpt_oss_20b, 24),
}
COMMON = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
