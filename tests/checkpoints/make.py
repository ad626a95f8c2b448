"""Makes the tiny checkpoints beside this file: random weights in the layout in which each family is released.

Run it in an environment of its own (its classes write the names and shapes; the project doesn't depend on them):

    python -m venv /tmp/released && /tmp/released/bin/pip install torch transformers==4.57.6
    /tmp/released/bin/python tests/checkpoints/make.py [FAMILY ...]

The configs are in configs.py; families that transformers 4.57 has no classes for, in by_hand.py. What releases hold
beside the model (multi-token-prediction blocks, vision towers, FP8 and int4 codes) is added here. No file is larger
than 200 KB.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from by_hand import Tensors, minimax_m2, qwen3_5_moe
from configs import CLASSES, HIDDEN, LAYERS
from safetensors.torch import save_file

HERE = Path(__file__).parent
SHARD = 190_000
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
