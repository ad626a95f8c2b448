"""The files beside the shards that follow from the source: config.json, the tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...allocation.artifacts import ARTIFACTS
from ...allocation.plan import Plan
from ...base.files import MTP_FILE, REFINED_FILE
from ...base.hf_config import edit_text_config
from ...base.quant_config import default_entry
from ...base.safetensors_header import INDEX, read_folder
from ...base.side_files import PROCESSOR, matches, may_be_copied, side_files
from ...checkpoint.config_keys import encoded
from ...checkpoint.layers import Inventory
from ...checkpoint.model_classes import model_class
from ...checkpoint.mtp_codes import IN_8_BITS, SETTINGS, head_settings
from ...checkpoint.roles import TOWER
from ...checkpoint.source import Source
from ...checkpoint.tokenizer import tokenizer_settings
from ...checkpoint.towers import has_mtp, text_only, tower_entries, without_mtp
from ...checkpoint.vlm_keys import NEEDS_PROCESSOR, PROCESSOR_CLASS, vision_keys, with_vlm_keys
from ..sources.multipliers import folded


def copy_small_files(source: Source, work: Path, parts: str) -> None:
    """Copy the known texts beside weights and config (base/side_files.py).

    Without a tower nothing is copied that a processor of images or sounds reads.
    """
    for name in side_files(source.path).copied:
        if parts != "all" and matches(name, PROCESSOR):
            continue
        target = work / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path / name, target)

    # The tokenizer's settings name the processor as well.
    settings = tokenizer_settings(work)
    if parts == "all" or not settings:
        return
    processor = settings.pop("processor_class", None)
    if source.config.get("model_type") in NEEDS_PROCESSOR:
        settings["processor_class"] = PROCESSOR_CLASS
    if processor is not None or "processor_class" in settings:
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (work / "tokenizer_config.json").write_text(text, encoding="utf-8")


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a finished checkpoint that a copy of it has: weights, config, known texts.

    Weights may be links to anywhere.
    """
    names = ("config.json", "README.md", INDEX, REFINED_FILE, MTP_FILE, *ARTIFACTS)
    texts = [folder / name for name in names if may_be_copied(folder / name, folder)]
    texts += [folder / name for name in side_files(folder).copied]
    return sorted({*texts, *(folder / name for name in read_folder(folder))})


def config_text(source: Source, inventory: Inventory, plan: Plan) -> str:
    """The source's config.json with our quantization, of the parts that the written model has."""
    config = {
        key: value
        for key, value in source.config.items()
        if key not in ("quantization", "quantization_config")
    }
    config = edit_text_config(
        config, lambda text: {k: v for k, v in text.items() if k != "quantization_config"}
    )

    # Without the towers and blocks that are left out. (Some classes run a tower themselves.)
    runs_tower = any(map(TOWER.search, inventory.order))
    if plan.parts != "all" and not runs_tower:
        reader = model_class(config)
        assert reader is not None  # a source of which mlx-lm has no class is refused
        config = text_only(config, reader.required | vision_keys(config))
    config = folded(config)
    if not has_mtp((f"{path}." for path in inventory.order), config):
        config = without_mtp(config)
    config = with_vlm_keys(config)

    if "BF16" in {layer.dtype for layer in inventory.layers}:
        config = edit_text_config(_with_bfloat16(config), _with_bfloat16)
    block = plan.quantization()
    towers = tower_entries(source.config, inventory)
    if towers:
        block = (block or default_entry(source.config)) | towers
    if block:
        config |= {"quantization": block, "quantization_config": block}
    if not _takes_packed_activations(plan):
        config.pop("quantize_activations", None)
    config.pop(SETTINGS, None)  # of the source's own head in 8 bits, which isn't read
    if plan.parts == IN_8_BITS:
        config |= head_settings(inventory, block)
    return json.dumps(encoded(dict(sorted(config.items()))), indent=4) + "\n"


def _takes_packed_activations(plan: Plan) -> bool:
    """Whether mlx-lm can quantize the activations too, as a source may say (mlx-lm 0.32)."""
    modes = {config.mode for config in plan.choice.values() if config.quantized}
    return bool(modes) and modes <= {"mxfp8", "nvfp4"}


def _with_bfloat16(config: dict[str, Any]) -> dict[str, Any]:
    """A config that states float32, for weights that are bfloat16 now."""
    return {
        key: "bfloat16" if key in ("dtype", "torch_dtype") and value == "float32" else value
        for key, value in config.items()
    }
