"""Prints the README's table of families: `python tests/checkpoints/table.py` (each row is one tiny checkpoint here)."""

from __future__ import annotations

import json
from pathlib import Path

from mint_mlx.converters.sources import read_layout
from mint_mlx.order import prepare
from mint_mlx.roles import ROLES

HERE = Path(__file__).parent
BY_HAND = ("qwen3_5_moe", "minimax_m2")
NAMES = {
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "dots1": "dots1",
    "ernie4_5_moe": "ERNIE-4.5-MoE",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "glm4_moe": "GLM-4-MoE",
    "gpt_oss": "gpt-oss",
    "gpt_oss_bf16": "gpt-oss, fine-tuned",
    "granitemoe": "Granite-MoE",
    "kimi_k2": "Kimi-K2",
    "llama": "Llama",
    "llama4": "Llama-4",
    "minimax_m2": "MiniMax-M2",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "phimoe": "PhiMoE",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3": "Qwen3",
    "qwen3_5_moe": "Qwen3.5-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_moe_fp8": "Qwen3-MoE-FP8",
    "qwen3_next": "Qwen3-Next",
}


def source_format(folder: Path) -> str:
    """How the family's weights are released."""
    layout = read_layout(json.loads((folder / "config.json").read_text()), folder) or {}
    method = layout.get("quant_method")
    names = {"fp8": "FP8, 128x128", "mxfp4": "MXFP4 experts", "compressed-tensors": "int4 experts"}
    return names.get(str(method), "bf16")


def row(family: str) -> str:
    """A family's line."""
    job = prepare(str(HERE / family))
    layers = job.inventory.layers
    found = {layer.role for layer in layers}
    roles = [role.replace("_", " ") for role in ROLES if role in found]
    if {"expert gate", "expert up", "expert down"} <= set(roles):
        roles = [r for r in roles if not r.startswith("expert ")]
        roles.append("experts (gate, up, down)")
    custom = not found & {"router"} and any(layer.kind == "experts" for layer in layers)
    if custom:
        roles.append("router (unquantized)")
    beside = " + tower" * bool(job.beside.towers) + " + MTP" * bool(job.beside.mtp)
    made = "by hand" if family in BY_HAND else "transformers"
    released = f"{source_format(HERE / family)}{beside}"
    return f"| {NAMES[family]} | {released} | {', '.join(roles)} | {job.recipe.name} | {made} |"


if __name__ == "__main__":
    print("| family | released as | roles found | recipe | layout from |")
    print("|---|---|---|---|---|")
    for folder in sorted(HERE.iterdir(), key=lambda f: NAMES.get(f.name, "").lower()):
        if (folder / "config.json").is_file():
            print(row(folder.name))
