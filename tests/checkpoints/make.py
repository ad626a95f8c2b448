"""Makes the tiny checkpoints beside this file: random weights in the layout in which each family is released.

Run it in an environment of its own (its classes write the names and shapes; the project doesn't depend on them):

    python -m venv /tmp/released && /tmp/released/bin/pip install torch transformers==4.57.6
    /tmp/released/bin/python tests/checkpoints/make.py [FAMILY ...]

transformers 4.57 has no classes for Qwen3.5-MoE and MiniMax-M2; their tensors are listed here by hand, after the index
files of the released models. What releases hold beside the model (multi-token-prediction blocks, vision towers, FP8 and
int4 codes) is added by hand as well. No file is larger than 200 KB.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
SHARD = 190_000
VOCAB, HIDDEN, HEADS, KV, HEAD_DIM, INNER, EXPERTS, LAYERS = 96, 64, 4, 2, 16, 64, 8, 2
Tensors = dict[str, torch.Tensor]

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
# Buffers and biases that stay in float32 in the released files.
FLOAT32 = ("e_score_correction_bias", "A_log")


def released(config_class: str, model_class: str, config: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors as transformers writes them."""
    import transformers

    made = getattr(transformers, config_class)(**config)
    made.dtype = torch.bfloat16
    model = getattr(transformers, model_class)(made)
    table = json.loads(made.to_json_string(use_diff=False))
    table["architectures"] = [model_class]
    for sub in (table, table.get("text_config") or {}):
        for key in ("_attn_implementation", "_attn_implementation_internal", "_name_or_path", "id2label", "label2id"):
            sub.pop(key, None)
    tied = set(getattr(model, "_tied_weights_keys", None) or []) if made.get_text_config().tie_word_embeddings else ()
    return table, {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


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


def randomize(tensors: Tensors) -> Tensors:
    """Weights uniform on a grid of 129 steps (bfloat16 holds them exactly; 2 bits stay above the safety floor)."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, tensor in sorted(tensors.items()):
        steps = torch.randint(-64, 65, tensor.shape, generator=generator).float() / 64
        if tensor.ndim < 2:  # a norm's weight near its initial value, a bias near zero
            start = tensor.float() if tensor.is_floating_point() else torch.zeros(tensor.shape)
            start = torch.where(start.isfinite() & (start.abs() < 8), start, 0.5)
            value = start + steps / 8
        else:
            value = steps * 2.0 ** torch.tensor(3.0 / tensor.shape[-1]).log2().mul(0.5).round()
        made[name] = value.to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16)
    return made


def to_fp8(tensors: Tensors) -> Tensors:
    """The linear weights of the blocks as E4M3 with a float32 scale for each 128x128."""
    made = {}
    for name, tensor in tensors.items():
        if not ((".layers." in name and name.endswith("proj.weight")) or ".experts." in name) or tensor.ndim != 2:
            made[name] = tensor
            continue
        rows, columns = tensor.shape
        padded = torch.zeros(-rows % 128 + rows, -columns % 128 + columns)
        padded[:rows, :columns] = tensor.float()
        blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
        made[name] = codes.to(torch.float8_e4m3fn)
        made[f"{name}_scale_inv"] = scale
    return made


def to_int4(tensors: Tensors) -> Tensors:
    """Experts as compressed-tensors' pack-quantized int4: eight codes + 8 in an int32, a bf16 scale for 32 weights."""
    made = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            made[name] = tensor
            continue
        groups = tensor.float().view(tensor.shape[0], -1, 32)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16)
        codes = (groups / scale.float()).round().clamp(-8, 7).view(tensor.shape).to(torch.int64) + 8
        packed = (codes.view(tensor.shape[0], -1, 8) << torch.arange(0, 32, 4)).sum(-1)
        base = name.removesuffix(".weight")
        made[f"{base}.weight_packed"] = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        made[f"{base}.weight_scale"] = scale[..., 0]
        made[f"{base}.weight_shape"] = torch.tensor(tensor.shape, dtype=torch.int32)
    return made


def to_mxfp4(tensors: Tensors) -> Tensors:
    """gpt-oss's experts as released: transposed to rows of inputs, blocks of 32 E2M1 codes with an E8M0 exponent."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    made = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = tensor
            continue
        groups = tensor.float().mT.reshape(tensor.shape[0], tensor.shape[2], -1, 32)
        exponent = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9).log2().floor() - 2
        scaled = groups / 2**exponent
        codes = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
        made[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        made[f"{name}_scales"] = (exponent[..., 0] + 127).to(torch.uint8)
    return made


def add_mtp(config: dict[str, Any], tensors: Tensors, number: int) -> None:
    """A block for multi-token prediction after the last, as DeepSeek-V3 and GLM-4-MoE are released."""
    last, extra = f"model.layers.{LAYERS - 1}.", f"model.layers.{number}."
    tensors |= {name.replace(last, extra): t.clone() for name, t in tensors.items() if name.startswith(last)}
    tensors[f"{extra}eh_proj.weight"] = torch.zeros(HIDDEN, 2 * HIDDEN)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{extra}{name}.weight"] = torch.ones(HIDDEN)
    config["num_nextn_predict_layers"] = 1


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True, "strategy": "group"},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}


def make(family: str) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of a family as it is released."""
    by_hand: dict[str, Callable[[], tuple[dict[str, Any], Tensors]]] = {
        "qwen3_5_moe": qwen3_5_moe,
        "minimax_m2": minimax_m2,
    }
    base = {"kimi_k2": "deepseek_v3", "qwen3_moe_fp8": "qwen3_moe", "gpt_oss_bf16": "gpt_oss"}.get(family, family)
    config, tensors = by_hand[family]() if family in by_hand else released(*CLASSES[base])
    if family in ("deepseek_v3", "glm4_moe"):
        add_mtp(config, tensors, 61 if family == "deepseek_v3" else LAYERS)  # mlx-lm knows DeepSeek's by its number
    if family == "qwen3_next":
        attention = f"model.layers.{LAYERS - 1}."
        extra = {n.replace(attention, "mtp.layers.0."): t.clone() for n, t in tensors.items() if attention in n}
        tensors |= extra | {"mtp.fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN), "mtp.norm.weight": torch.zeros(HIDDEN)}
    tensors = randomize(tensors)
    if family in ("deepseek_v3", "minimax_m2", "qwen3_moe_fp8"):
        tensors, config["quantization_config"] = to_fp8(tensors), FP8
    if family == "gpt_oss":
        skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        tensors = to_mxfp4(tensors)
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skip}
    if family == "kimi_k2":
        tensors, config["quantization_config"], config["model_type"] = to_int4(tensors), INT4, "kimi_k2"
    return config, tensors


FAMILIES = [*CLASSES, "gpt_oss_bf16", "qwen3_5_moe", "minimax_m2", "kimi_k2", "qwen3_moe_fp8"]


def write(family: str) -> None:
    """Write a family's folder: shards of at most SHARD bytes, the index and the config."""
    config, tensors = make(family)
    folder = HERE / family
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        held = sum(t.nbytes + 120 for t in shards[-1].values())
        if shards[-1] and held + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        assert (folder / file).stat().st_size <= 200_000, (family, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    print(f"{family}: {len(tensors)} tensors, {total:,} bytes, {len(shards)} shards")


if __name__ == "__main__":
    torch.manual_seed(0)
    for chosen in sys.argv[1:] or FAMILIES:
        write(chosen)
