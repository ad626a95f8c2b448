"""What mlx-vlm's classes need of a checkpoint besides what mlx-lm's do.

LM Studio's engine (mlx-engine of August 2026) loads everything through mlx-vlm: a model with a
`vision_config` at once, any other lazily at first, to see whether requests can share a batch. A
text model of a family with a tower is loaded by that family's class there, so its config says what
that class can't do without. What is said here was tried with mlx-vlm 0.7.10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..base.hf_config import edit_text_config, text_config
from .config_keys import OUTSIDE
from .layers import Inventory

Table = dict[str, Any]
# Families whose class can't be made without a vision_config. (A tower without tensors is dropped.)
NEEDS_VISION = frozenset(("gemma3", "llama4", "llava"))
# Those for which transformers' AutoProcessor wants settings of images, which a text model lacks.
NEEDS_PROCESSOR = frozenset(("gemma3", "llava"))
PROCESSOR_CLASS = "AutoTokenizer"  # what AutoProcessor makes of a text model instead
# Families that mlx-vlm reads in the flat form of their releases only.
FLAT = frozenset(("qwen2_vl", "qwen2_5_vl"))
# Those whose class reads the kind of scaled positions as `type` only, and knows one kind.
NAMES_TYPE = frozenset(("llava", "mistral3"))
LINEAR = "linear"
# Keys of towers that may be null for a family's class.
READS_NULL = {
    "gemma4": frozenset(("audio_config",)),
    "muse_spark": frozenset(("vision_config", "audio_config")),
}
# How transformers 5 calls towers that have their family's own name in releases.
OF_TRANSFORMERS_5 = frozenset(
    f"{family}_vision" for family in (*FLAT, "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
)
# Families whose text alone, as mlx-lm has it, mlx-vlm can't load, and why.
TEXT_ALONE = {
    "deepseek_v41": "has other names for tensors of the language model",
    "gemma3n": "looks for the tensors of the tower",
    "kimi_vl": "has other tensors for attention",
}
COPIED_HEAD = "mlx-vlm copies Gemma 3's embedding to its head, which it can do with 16 bits only"


def vision_keys(config: Table) -> frozenset[str]:
    """The keys that describe a tower and are stated by a text model too."""
    needed = config.get("model_type") in NEEDS_VISION
    return frozenset(("vision_config",)) if needed else frozenset()


def reads_null(config: Table) -> frozenset[str]:
    """The keys that describe a tower and may be null for mlx-vlm's class."""
    return READS_NULL.get(str(config.get("model_type")), frozenset())


def with_vlm_keys(config: Table) -> Table:
    """A config that says the same to mlx-vlm's class as to mlx-lm's.

    transformers 5 writes keys and model types that mlx-vlm's classes don't know. Each value is one
    that the config says already.

    Args:
        config: as `config_keys.adapt` brings it.
    """
    family = config.get("model_type")
    vision = config.get("vision_config")
    if isinstance(vision, dict) and vision.get("model_type") in OF_TRANSFORMERS_5:
        config = config | {"vision_config": vision | {"model_type": family}}
    if text_config(config) is config:
        return config

    config = edit_text_config(config, lambda table: _text_keys(str(family), table))
    if family in FLAT:
        # transformers 4 leaves what the flat release said beside the table, and goes by the table.
        outer = {key: value for key, value in config.items() if key != "text_config"}
        whole = {key: outer[key] for key in ("model_type", *OUTSIDE) if key in outer}
        config = outer | text_config(config) | whole
    return config


def _text_keys(family: str, table: Table) -> Table:
    """The text model's table, with its rotary positions in the words of mlx-vlm's class."""
    table = _typed(table) if family in NAMES_TYPE else table
    rope = table.get("rope_parameters")
    if family == "gemma3" and "rope_theta" in table:
        return {"rope_global_base_freq": table["rope_theta"]} | table
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_type"), str):
        return table
    if family in (*FLAT, "qwen3_vl", "qwen3_vl_moe") and "mrope_section" in rope:
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        scaling = {"type": rope["rope_type"]} | scaling
        return theta | {"rope_scaling": scaling} | table
    return table


def _typed(table: Table) -> Table:
    """The table, in which linear positions also have the `type` that older releases wrote.

    Other kinds get none: with it Mistral 3 would load, and compute other positions.
    """
    typed = {
        key: {"type": LINEAR} | rope
        for key in ("rope_scaling", "rope_parameters")
        if isinstance(rope := table.get(key), dict) and rope.get("rope_type") == LINEAR
    }
    return table | typed


def _kind_of_positions(config: Table) -> Any:
    """The kind of a text model's scaled positions, None where nothing scales them."""
    table = text_config(config)
    rope = table.get("rope_scaling") or table.get("rope_parameters")
    return (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None


def tower_name(config: Table, name: str) -> str:
    """What a tower's tensor is called in a result, so that mlx-lm drops it and mlx-vlm reads it."""
    family = config.get("model_type")
    # mlx-lm's class takes `model.visual` for a part of the language model.
    if family == "qwen3_vl" and name.startswith("model.visual."):
        return "vision_tower." + name.removeprefix("model.visual.")
    # transformers 5 leaves out a level of the names.
    tower = "vision_tower."
    if family in ("gemma3", "llava") and name.startswith(tower):
        return f"{tower}vision_model." + name.removeprefix(tower).removeprefix("vision_model.")
    return name


def for_vlm(inventory: Inventory, config: Table) -> Inventory:
    """An inventory whose embedding and head stay at 16 bits where mlx-vlm can't load others."""
    if config.get("model_type") != "gemma3":
        return inventory
    layers = tuple(
        replace(layer, keep=layer.keep or COPIED_HEAD)
        if layer.role in ("embedding", "head")
        else layer
        for layer in inventory.layers
    )
    return replace(inventory, layers=layers)


def vlm_limits(config: Table, has_tower: bool, quantized: bool) -> Iterator[str]:
    """Why mlx-vlm and LM Studio can't load a checkpoint, whatever its config says.

    Args:
        config: as `config_keys.adapt` brings it.
        has_tower: whether it holds a tower's tensors.
        quantized: whether its embedding is quantized.
    """
    family = str(config.get("model_type"))
    where = "mlx-vlm 0.7.10, and so LM Studio, cannot load"
    if family in TEXT_ALONE and not has_tower:
        yield f"{where} the text model of {family} alone: its class {TEXT_ALONE[family]}"
    kind = _kind_of_positions(config)
    ministral = text_config(config).get("model_type") in ("ministral3", "mistral4")
    if family in NAMES_TYPE and not ministral and kind not in (None, "default", LINEAR):
        yield (
            f"{where} {family} with rotary positions of the kind {kind}, or computes others: its "
            "class knows linear ones only"
        )
    if family == "gemma3" and quantized:
        yield (
            f"{where} Gemma 3 with a quantized embedding: --parts all leaves it at 16 bits, and so "
            "does --override embed_tokens=keep"
        )
