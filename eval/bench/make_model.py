"""Write a Hugging Face checkpoint with a released model's true shapes and random weights, a few of its layers.

    python eval/bench/make_model.py qwen3-30b-a3b --layers 2 -o FOLDER

Names, shapes, types and shards are those of the released files (config.json and index of each model on the Hub). The
weights are heavy-tailed (Student's t with six degrees of freedom, a scale of its own for each row), drawn from one pool
of such numbers, so that writing is bound by the disk. The tokenizer knows bytes only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARD = 4_000_000_000
POOL = 1 << 24
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
    sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    made: Shapes = {f"{block}.self_attn.{n}_proj.weight": size for n, size in sizes.items()}
    if bias:
        made |= {f"{block}.self_attn.{n}_proj.bias": size[:1] for n, size in sizes.items()}
    return made | {f"{block}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}


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
    shapes = _ends(hidden, vocabulary)
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= _attention(block, hidden, 4096, 1024)
        shapes[f"{block}.block_sparse_moe.gate.weight"] = (8, hidden)
        for e in range(8):
            expert = f"{block}.block_sparse_moe.experts.{e}"
            shapes |= {f"{expert}.w1.weight": (inner, hidden), f"{expert}.w3.weight": (inner, hidden)}
            shapes[f"{expert}.w2.weight"] = (hidden, inner)
    return config, shapes


def deepseek_v3(layers: int) -> Model:
    """deepseek-ai/DeepSeek-V3 in bf16: of a single layer that one has experts, else the first is dense."""
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
        shapes |= {f"{block}.mlp.gate.weight": (experts, hidden), f"{block}.mlp.gate.e_score_correction_bias": (256,)}
        shapes |= _mlp(f"{block}.mlp.shared_experts", hidden, 2048)
        for e in range(experts):
            shapes |= _mlp(f"{block}.mlp.experts.{e}", hidden, 2048)
    return config, shapes


def deepseek_v3_fp8(layers: int) -> Model:
    """The same as released: FP8 in blocks of 128x128 with a float32 scale each."""
    config, shapes = deepseek_v3(layers)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    made: Shapes = {}
    for name, shape in shapes.items():
        made[name] = shape
        if name.endswith(("_proj.weight", "_mqa.weight")):
            made[f"{name}_scale_inv"] = tuple(-(-n // FP8_BLOCK) for n in shape)
    return config, made


def qwen3_5_35b(layers: int) -> Model:
    """Qwen/Qwen3.5-35B-A3B, its language model: linear attention in three of four layers, fused experts."""
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
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25},
    }
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": text,
    }
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
        "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)],
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


# Each with the number of layers that the released model has, and how many of those are of the repeated kind.
SHAPES: dict[str, tuple[Callable[[int], Model], int]] = {
    "qwen3-30b-a3b": (qwen3_30b, 48),
    "mixtral-8x7b": (mixtral, 32),
    "deepseek-v3": (deepseek_v3, 61),
    "deepseek-v3-fp8": (deepseek_v3_fp8, 61),
    "qwen3.5-35b-a3b": (qwen3_5_35b, 40),
    "gpt-oss-20b": (gpt_oss_20b, 24),
}
COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16"}


def kind_of(name: str, config: dict[str, Any]) -> str:
    """The safetensors type of a tensor in the released file."""
    if name.endswith(("_blocks", "_scales")):
        return "U8"
    if name.endswith(("_scale_inv", "e_score_correction_bias", "A_log")):
        return "F32"
    fp8 = config.get("quantization_config", {}).get("quant_method") == "fp8"
    return "F8_E4M3" if fp8 and name.endswith(("_proj.weight", "_mqa.weight")) else "BF16"


ITEMSIZE = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


def _bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, cut off."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


class Weights:
    """Random tensors of a given name, shape and type."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        normal = self.rng.standard_normal(POOL, dtype=np.float32)
        spread = self.rng.chisquare(6, POOL).astype(np.float32) / 6
        self.pool = normal / np.sqrt(spread)
        self.codes = self.rng.integers(0, 256, POOL, dtype=np.uint8)

    def make(self, name: str, shape: tuple[int, ...], kind: str) -> bytes:
        """The tensor's bytes."""
        size = int(np.prod(shape))
        if name.endswith("_scales"):  # exponents of MXFP4, around 2^-6
            return self.rng.integers(119, 123, size, dtype=np.uint8).tobytes()
        if kind == "U8":
            return self._repeat(self.codes, size).tobytes()
        if kind == "F8_E4M3":  # no NaN: its code is 127 with either sign
            codes = self._repeat(self.codes, size)
            return np.where((codes & 127) == 127, codes ^ 1, codes).tobytes()
        if name.endswith("_scale_inv"):
            return (self.rng.uniform(0.5, 1.5, size) * 2e-4).astype(np.float32).tobytes()
        if len(shape) == 1 or name.endswith("A_log"):
            start = 1.0 if "norm" in name else 0.0
            values = (start + 0.02 * self.rng.standard_normal(size)).astype(np.float32)
            return values.tobytes() if kind == "F32" else _bf16(values).tobytes()
        rows = size // shape[-1]
        scale = np.exp(0.3 * self.rng.standard_normal((rows, 1), dtype=np.float32)) * 0.7 / np.sqrt(shape[-1])
        values = self._repeat(self.pool, size).reshape(rows, shape[-1]) * scale.astype(np.float32)
        return _bf16(values).tobytes()

    def _repeat(self, pool: np.ndarray, size: int) -> np.ndarray:
        start = int(self.rng.integers(0, POOL))
        return np.resize(np.roll(pool, -start) if size > POOL - start else pool[start:], size)


def write(shape: str, layers: int, folder: Path) -> int:
    """Write the checkpoint; returns the bytes of its weights."""
    builder, _ = SHAPES[shape]
    config, shapes = builder(layers)
    config = COMMON | {"eos_token_id": 0, "bos_token_id": 1} | config
    kinds = {name: kind_of(name, config) for name in shapes}
    sizes = {name: int(np.prod(s)) * ITEMSIZE[kinds[name]] for name, s in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > SHARD:
            shards.append([])
        shards[-1].append(name)
    folder.mkdir(parents=True)
    weights = Weights()
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name in names:
            offsets = [position, position + sizes[name]]
            header[name] = {"dtype": kinds[name], "shape": shapes[name], "data_offsets": offsets}
            position += sizes[name]
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                out.write(weights.make(name, shapes[name], kinds[name]))
        where |= dict.fromkeys(names, file)
    total = sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return total


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.out.exists():
        sys.exit(f"error: {asked.out} exists already: choose another folder with -o")
    least, most = 2 if asked.shape == "gpt-oss-20b" else 1, SHAPES[asked.shape][1]  # that one's two kinds alternate
    if not least <= asked.layers <= most:
        sys.exit(f"error: {asked.shape} has {most} layers: give --layers from {least} to as many")
    total = write(asked.shape, asked.layers, asked.out)
    print(f"{asked.out}: {asked.shape}, {asked.layers} of {SHAPES[asked.shape][1]} layers, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
