"""Families that transformers 4.57 has no classes for: config and shapes, after the index files of the released ones."""

from __future__ import annotations

from typing import Any

import torch
from configs import BASE, EXPERTS, HEAD_DIM, HEADS, HIDDEN, INNER, KV, LAYERS, MOE, VOCAB

Tensors = dict[str, torch.Tensor]


def qwen3_5_moe() -> tuple[dict[str, Any], Tensors]:
    """Qwen3.5-MoE after the index of Qwen3.5-35B-A3B: experts fused, a vision tower, one MTP block."""
    text = MOE | {
        "model_type": "qwen3_5_moe_text",
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "attn_output_gate": True,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "mlp_only_layers": [],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
        },
    }
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {
            "model_type": "qwen3_5_moe",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
            "hidden_act": "gelu_pytorch_tanh",
        },
    }

    def moe(prefix: str) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.mlp.gate.weight": (EXPERTS, HIDDEN),
            f"{prefix}.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
            f"{prefix}.mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
            f"{prefix}.mlp.shared_expert.gate_proj.weight": (64, HIDDEN),
            f"{prefix}.mlp.shared_expert.up_proj.weight": (64, HIDDEN),
            f"{prefix}.mlp.shared_expert.down_proj.weight": (HIDDEN, 64),
            f"{prefix}.mlp.shared_expert_gate.weight": (1, HIDDEN),
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        }

    def full(prefix: str) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.self_attn.q_proj.weight": (2 * HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (KV * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (KV * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"{prefix}.self_attn.k_norm.weight": (HEAD_DIM,),
        }

    key, value, layers = 2 * 32, 4 * 32, "model.language_model.layers"
    shapes = {
        "model.language_model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.language_model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
        f"{layers}.0.linear_attn.in_proj_qkv.weight": (2 * key + value, HIDDEN),
        f"{layers}.0.linear_attn.in_proj_z.weight": (value, HIDDEN),
        f"{layers}.0.linear_attn.in_proj_a.weight": (4, HIDDEN),
        f"{layers}.0.linear_attn.in_proj_b.weight": (4, HIDDEN),
        f"{layers}.0.linear_attn.conv1d.weight": (2 * key + value, 1, 4),
        f"{layers}.0.linear_attn.A_log": (4,),
        f"{layers}.0.linear_attn.dt_bias": (4,),
        f"{layers}.0.linear_attn.norm.weight": (32,),
        f"{layers}.0.linear_attn.out_proj.weight": (HIDDEN, value),
        "model.visual.patch_embed.proj.weight": (32, 3, 2, 4, 4),
        "model.visual.patch_embed.proj.bias": (32,),
        "model.visual.pos_embed.weight": (16, 32),
        "model.visual.blocks.0.norm1.weight": (32,),
        "model.visual.blocks.0.norm1.bias": (32,),
        "model.visual.blocks.0.norm2.weight": (32,),
        "model.visual.blocks.0.norm2.bias": (32,),
        "model.visual.blocks.0.attn.qkv.weight": (96, 32),
        "model.visual.blocks.0.attn.qkv.bias": (96,),
        "model.visual.blocks.0.attn.proj.weight": (32, 32),
        "model.visual.blocks.0.attn.proj.bias": (32,),
        "model.visual.blocks.0.mlp.linear_fc1.weight": (64, 32),
        "model.visual.blocks.0.mlp.linear_fc1.bias": (64,),
        "model.visual.blocks.0.mlp.linear_fc2.weight": (32, 64),
        "model.visual.blocks.0.mlp.linear_fc2.bias": (32,),
        "model.visual.merger.norm.weight": (32,),
        "model.visual.merger.norm.bias": (32,),
        "model.visual.merger.linear_fc1.weight": (128, 128),
        "model.visual.merger.linear_fc1.bias": (128,),
        "model.visual.merger.linear_fc2.weight": (HIDDEN, 128),
        "model.visual.merger.linear_fc2.bias": (HIDDEN,),
        "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
        "mtp.norm.weight": (HIDDEN,),
        "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
        "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
        **moe(f"{layers}.0"),
        **moe(f"{layers}.1"),
        **full(f"{layers}.1"),
        **moe("mtp.layers.0"),
        **full("mtp.layers.0"),
    }
    return config, {name: torch.zeros(shape) for name, shape in shapes.items()}


def minimax_m2() -> tuple[dict[str, Any], Tensors]:
    """MiniMax-M2 after its index: FP8 in blocks of 128, QK-norm over all heads."""
    config = BASE | {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "intermediate_size": INNER,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "rotary_dim": 8,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "use_routing_bias": True,
        "torch_dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        prefix = f"model.layers.{i}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (KV * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (KV * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.self_attn.q_norm.weight": (HEADS * HEAD_DIM,),
            f"{prefix}.self_attn.k_norm.weight": (KV * HEAD_DIM,),
            f"{prefix}.block_sparse_moe.gate.weight": (EXPERTS, HIDDEN),
            f"{prefix}.block_sparse_moe.e_score_correction_bias": (EXPERTS,),
        }
        for e in range(EXPERTS):
            experts = f"{prefix}.block_sparse_moe.experts.{e}"
            shapes |= {f"{experts}.{w}.weight": (INNER, HIDDEN) for w in ("w1", "w3")}
            shapes[f"{experts}.w2.weight"] = (HIDDEN, INNER)
    return config, {name: torch.zeros(shape) for name, shape in shapes.items()}
