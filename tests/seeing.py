"""Tiny checkpoints with a tower, in the form of their releases (transformers 5 changed it)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
from helpers import write_tokenizer
from released import RELEASED, released, saved

SECTIONS = [4, 2, 2]
SEEING = (
    "gemma3",
    "gemma4",
    "llama4",
    "llava",
    "mistral3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
)


def seeing(family: str, folder: Path) -> Path:
    """A checkpoint of a family with its tower."""
    if family == "llama4":
        return released(family, folder)
    saved(RELEASED / "drawn_5" / family, folder)
    write_tokenizer(folder)
    path = folder / "config.json"
    config = _released_form(family, json.loads(path.read_text()))
    path.write_text(json.dumps(config))

    # Releases have no head of Gemma's tower, and none at several depths of Qwen3.5's.
    weights: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    weights = {
        name: _placed(name, array) if family == "gemma3" else array
        for name, array in weights.items()
        if not (family == "gemma3" and ".head." in name)
        and not (family.startswith("qwen3_5") and "deepstack" in name)
    }
    mx.eval(weights)
    mx.save_safetensors(str(folder / "new.safetensors"), weights, metadata={"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    return folder


def _placed(name: str, array: mx.array) -> mx.array:
    """An embedding of positions for 16 patches a side, of which mlx-vlm makes 16 tokens a side."""
    if "position_embedding" not in name:
        return array
    return mx.zeros((256, array.shape[-1]), array.dtype)


def _released_form(family: str, config: dict[str, Any]) -> dict[str, Any]:
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    if family.startswith("qwen") and not family.startswith("qwen3_5"):
        vision["model_type"] = family
    if family == "gemma3":
        text |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}
        text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
        vision |= {"image_size": 64, "vision_use_head": False}
    elif family.startswith("qwen2"):
        text |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": SECTIONS}}
        text = {key: value for key, value in text.items() if key not in ("model_type", "head_dim")}
        config = text | {key: value for key, value in config.items() if key != "text_config"}
    elif family.startswith("qwen3_vl"):
        text |= {"rope_theta": 5e6, "norm_topk_prob": True}
        text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": SECTIONS}
        text["rope_scaling"]["rope_type"] = "default"
    elif family.startswith("qwen3_5"):
        text["rope_parameters"] = rope | {"mrope_interleaved": True}
        vision |= {"deepstack_visual_indexes": [], "model_type": family}
    elif family == "gemma4":
        text["rope_parameters"] = rope
    else:
        text["rope_theta"] = math.exp(10)
    return config
