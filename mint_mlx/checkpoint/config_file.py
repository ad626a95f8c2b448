"""Reads config.json, and refuses what is malformed before anything is built from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.hf_config import config_tables
from ..base.safetensors_header import TensorInfo

# The keys of a config from which mlx-lm's model classes take the number of blocks.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_kv_reuse_layers")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a table.

    Raises:
        MintError: it is missing or malformed.
    """
    path = folder / "config.json"
    _refuse_adapter(folder)
    if not path.is_file():
        kind = " (it is of a diffusion model)" if (folder / "model_index.json").is_file() else ""
        raise MintError(
            f"{folder.name} has no config.json{kind}: give the folder of a Hugging Face checkpoint "
            "of a language model"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise MintError(
            f"config.json in {folder.name} is not valid JSON: download it again"
        ) from None
    if not isinstance(config, dict):
        raise MintError(f"config.json in {folder.name} is not a table: download it again")

    # The keys that this program and mlx-lm read without a check of their own.
    for key in ("text_config", "quantization_config", "quantization"):
        if not isinstance(config.get(key), (dict, type(None))):
            raise _malformed(folder, key, "a table")
    names = config.get("architectures") or []
    if not isinstance(names, (list, str)) or any(not isinstance(name, str) for name in names):
        raise _malformed(folder, "architectures", "a list of names")
    text_types = [table.get("model_type") for table in config_tables(config)[1:]]
    if any(not isinstance(name, (str, type(None))) for name in text_types):
        raise _malformed(folder, "text_config.model_type", "a name")
    return config


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with the weights of an adapter (LoRA) and none of a model.

    Raises:
        MintError: with the name of the model that it belongs to where it tells it.
    """
    path = folder / "adapter_config.json"
    if not path.is_file() or any(folder.glob("model*.safetensors")):
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, RecursionError, AttributeError):
        base = None
    of = f" of {base}" if isinstance(base, str) and base else ""
    raise MintError(
        f"{folder.name} holds an adapter{of}, not a model: merge it into its model first "
        "(merge_and_unload of peft, or mlx_lm.fuse), and give the result"
    )


def _malformed(folder: Path, key: str, expected: str) -> MintError:
    return MintError(f"{key} in {folder.name}'s config.json is not {expected}: download it again")


def check_depth(config: dict[str, Any], headers: dict[str, dict[str, TensorInfo]]) -> None:
    """Refuse a config with more blocks than tensors: building a million would take all memory.

    Raises:
        MintError: with both numbers.
    """
    tensors = sum(map(len, headers.values()))
    for table in config_tables(config):
        for key in DEPTHS:
            if isinstance(table.get(key), (int, float)) and table[key] > tensors:
                raise MintError(
                    f"config.json says {key} is {table[key]}, but there are {tensors} tensors: it "
                    "belongs to another checkpoint, or the download is incomplete"
                )
