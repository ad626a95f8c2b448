"""Small checkpoints in the formats of quantization tools: real tensors, and by hand.

fixtures/quantized/NAME/ holds a few tensors that a tool wrote (fixtures/cut.py), with the products
of each weight as the tool dequantizes it with two vectors of signs: a misread code, scale, zero
point, order or axis shows in them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from helpers import rewrite_shards, write_checkpoint
from signs import products as products

from mint_mlx.base.safetensors_header import TensorInfo
from mint_mlx.converters.sources.packed import Group, Packed, dequantize
from mint_mlx.converters.sources.stated import Stated

FOLDER = Path(__file__).parent / "fixtures" / "quantized"
NAMES = sorted(folder.name for folder in FOLDER.iterdir())
CODES = {
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "U32": np.uint32,
    "F32": np.float32,
    "F16": np.float16,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "F8_E5M2": np.uint8,
}


def checkpoint(name: str, folder: Path) -> Path:
    """A whole checkpoint around the tensors of a fixture; all else is random."""
    config = json.loads((FOLDER / name / "config.json").read_text())
    write_checkpoint(folder, (config, _shapes(config)))
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    (folder / "tensors.safetensors").rename(folder / "model.tool.safetensors")

    # The tool's tensors take the place of the random weight of the same layer.
    layers = {
        re.sub(r"\.weight\..*|\.[^.]*$", "", tensor)
        for tensor in mx.load(str(folder / "model.tool.safetensors"))
    }
    experts = range(config.get("num_experts", 0))
    layers |= {layer.replace("switch_mlp", f"experts.{e}") for layer in layers for e in experts}
    random = folder / "model.safetensors"
    weights = mx.load(str(random))
    mx.eval(weights)
    others = {n: array for n, array in weights.items() if n.removesuffix(".weight") not in layers}
    mx.save_safetensors(str(random), others)
    return rewrite_shards(folder, lambda tensors: None)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama or a Qwen3-MoE of one block, by the names of their releases."""
    wide, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head = config.get("head_dim") or wide // config["num_attention_heads"]
    query, key = (config[f"num_{k}_heads"] * head for k in ("attention", "key_value"))
    block = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, wide),
        "model.norm.weight": (wide,),
        "lm_head.weight": (vocab, wide),
        f"{block}.input_layernorm.weight": (wide,),
        f"{block}.post_attention_layernorm.weight": (wide,),
        f"{block}.self_attn.q_proj.weight": (query, wide),
        f"{block}.self_attn.k_proj.weight": (key, wide),
        f"{block}.self_attn.v_proj.weight": (key, wide),
        f"{block}.self_attn.o_proj.weight": (wide, query),
    }
    experts = config.get("num_experts", 0)
    if experts:
        inner = config["moe_intermediate_size"]
        shapes |= {f"{block}.self_attn.{n}_norm.weight": (head,) for n in "qk"}
        shapes[f"{block}.mlp.gate.weight"] = (experts, wide)
    for owner in [f"mlp.experts.{e}" for e in range(experts)] or ["mlp"]:
        shapes |= {f"{block}.{owner}.{n}_proj.weight": (inner, wide) for n in ("gate", "up")}
        shapes[f"{block}.{owner}.down_proj.weight"] = (wide, inner)
    return shapes


def truth(name: str) -> dict[str, np.ndarray]:
    """The products (2, rows) of a fixture's weights as its tool dequantizes them, by name."""
    file = FOLDER / name / "truth.npz"
    return dict(np.load(file)) if file.is_file() else {}


def difference(products: np.ndarray, expected: np.ndarray) -> float:
    """How far products lie from the expected ones, relative to these."""
    return float(np.linalg.norm(products - expected) / np.linalg.norm(expected))


# A scheme of weights in a compressed-tensors config.
INT4 = {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}


def raw_tensor(code: str, values: np.ndarray) -> tuple[str, list[int], bytes]:
    """A tensor for `rewrite_shards` from numbers in the NumPy type of a safetensors code."""
    values = np.ascontiguousarray(values, dtype=CODES[code])
    return code, list(values.shape), values.tobytes()


Arrays = dict[str, tuple[str, np.ndarray]]  # type and numbers by role


def group(arrays: Arrays, stem: str = "layer.weight") -> Group:
    """The tensors of one weight, by role."""
    infos = {
        role: TensorInfo(code, values.shape, 0, values.nbytes)
        for role, (code, values) in arrays.items()
    }
    return Group(stem, {role: f"{stem}_{role}" for role in arrays}, infos)


def matched(form: Any, arrays: Arrays, local: bool = True, **table: Any) -> Packed | None:
    """What a format's module makes of a weight's tensors.

    Args:
        form: the module.
        arrays: the tensors.
        local: whether their numbers are on this machine.
        table: the `quantization_config`.
    """

    def values(name: str) -> np.ndarray:
        flat = arrays[name.removeprefix("layer.weight_")][1].reshape(-1)
        return flat if local else np.zeros_like(flat)

    packed: Packed | None = form.match(group(arrays), Stated(table, values))
    return packed


def read(form: Any, arrays: Arrays, **table: Any) -> tuple[Packed, np.ndarray]:
    """How a format's module reads a weight, and the weight in float32."""
    packed = matched(form, arrays, **table)
    assert packed is not None
    loaded = {role: _load(code, values) for role, (code, values) in arrays.items()}
    weight = packed.read(loaded)
    if packed.config is not None:
        columns = packed.shape[-1]
        assert weight.scales.shape[-1] == columns // packed.config.group_size
        weight = dequantize(weight, packed.config)
    assert weight.shape == packed.shape
    return packed, np.array(weight.astype(mx.float32))


def _load(code: str, values: np.ndarray) -> mx.array:
    """An array as mx.load returns it: floats of 8 bits are bytes."""
    array = mx.array(np.ascontiguousarray(values, dtype=CODES.get(code, np.float32)))
    return array.astype(mx.bfloat16) if code == "BF16" else array


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, columns) as int32 words (rows, words), without a gap, the lowest bits first."""
    single = codes[..., None] >> np.arange(bits) & 1
    flat = single.reshape(len(codes), -1).astype(np.uint8)
    flat = np.pad(flat, [(0, 0), (0, -flat.shape[1] % 32)])
    words = np.packbits(flat, axis=-1, bitorder="little")
    return np.ascontiguousarray(words).view(np.int32)


def padded(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, columns) as int32 words, as many whole ones in each as fit."""
    per_word = 32 // bits
    codes = np.pad(codes, [(0, 0), (0, -codes.shape[1] % per_word)]).astype(np.uint32)
    by_word = codes.reshape(len(codes), -1, per_word) << np.arange(per_word, dtype=np.uint32) * bits
    return np.bitwise_or.reduce(by_word, axis=-1).view(np.int32)
