"""What a released checkpoint holds beside the language model: towers, and blocks for multi-token
prediction (MTP).

mlx-lm drops both. A text model (`--parts text`) then says nothing of them in its config.json
either; `--parts all` copies a vision or audio tower's tensors as they are, for loaders that use
them (mlx-vlm); mlx-lm drops them again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..base.errors import MintError, UsageError
from ..base.hf_config import edit_text_config, text_config
from ..base.safetensors_header import TensorInfo
from ..base.units import human
from .block_path import block_of
from .layers import MLX_DTYPES, Inventory
from .layout import TensorSpec
from .roles import TOWER

PARTS = ("text", "all")
TOWERS = {"vision_config": r"vision|visual|image", "audio_config": r"audio|speech"}
MTP_KEYS = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_transformer_layers",
    "use_mtp",
)
PROCESSOR_FILES = ("*processor_config.json", "image_processor*.json", "feature_extractor*.json")
_TOWER_KEY = re.compile(
    r"(use_unified_)?(vision|visual|video|image|img|media|audio|speech|boi|eoi|boa|eoa|multi_?modal|mm|projector)_\w+"
)


def check_parts(parts: str) -> None:
    """Refuse what is no choice of parts.

    Raises:
        UsageError: saying which there are.
    """
    if parts not in PARTS:
        raise UsageError(f"--parts {parts} is unknown: there are {' and '.join(PARTS)}")


@dataclass(frozen=True)
class Beside:
    """Tensors of a source that its language model doesn't use, by name."""

    towers: dict[str, TensorInfo]
    mtp: dict[str, TensorInfo]

    @property
    def parameters(self) -> int:
        """Numbers in them, which count where all of a source's bytes do."""
        return sum(prod(info.shape) for table in (self.towers, self.mtp) for info in table.values())


def find_beside(
    headers: Iterable[dict[str, TensorInfo]], config: dict[str, Any], inventory: Inventory
) -> Beside:
    """The tower's and the multi-token-prediction tensors of a source that mlx-lm's model leaves
    out.
    """
    used = set(inventory.order)
    found: tuple[dict[str, TensorInfo], dict[str, TensorInfo]] = {}, {}
    for table in headers:
        for name, info in table.items():
            if name.rpartition(".")[0] in used:
                continue
            if TOWER.search(name):
                found[0][name] = info
            elif is_mtp(name, config):
                found[1][name] = info
    return Beside(*found)


def is_mtp(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor belongs to multi-token prediction: by name, or by a block too many."""
    if re.search(r"(^|\.)mtp", name):
        return True
    depth = text_config(config).get("num_hidden_layers")
    block = block_of(name)
    return type(depth) is int and block is not None and block >= depth and not TOWER.search(name)


def with_towers(inventory: Inventory, towers: dict[str, TensorInfo]) -> Inventory:
    """An inventory that carries a tower's tensors as they are in the source.

    Raises:
        MintError: one is of a type that MLX can't hold.
    """
    owned: dict[str, list[TensorSpec]] = {}
    for name, info in towers.items():
        if info.dtype not in MLX_DTYPES:
            raise MintError(
                f"{name} is of type {info.dtype}, which cannot be copied as it is: give --parts "
                "text"
            )
        owned.setdefault(name.rpartition(".")[0], []).append(
            TensorSpec(name, info.dtype, info.shape)
        )
    carried = tuple(owned)
    others = inventory.others | {owner: tuple(specs) for owner, specs in owned.items()}
    return replace(inventory, others=others, order=inventory.order + carried, carried=carried)


def text_only(config: dict[str, Any], needed: Collection[str]) -> dict[str, Any]:
    """A config without what tells of towers; `needed` are keys that the model class can't do
    without.
    """
    kept = {
        key: value
        for key, value in config.items()
        if key in needed or not _TOWER_KEY.fullmatch(key)
    }
    if kept.keys() != config.keys() and isinstance(config.get("architectures"), list):
        names = [
            name.replace("ForConditionalGeneration", "ForCausalLM")
            for name in config["architectures"]
        ]
        kept["architectures"] = names
    return kept


def without_mtp(config: dict[str, Any]) -> dict[str, Any]:
    """A config that declares no blocks for multi-token prediction."""
    edited = {
        key: type(value)(0) if key in MTP_KEYS and value else value for key, value in config.items()
    }
    return edit_text_config(edited, without_mtp)


def has_mtp(names: Iterable[str], config: dict[str, Any]) -> bool:
    """Whether any of these tensors belongs to multi-token prediction."""
    return any(is_mtp(name, config) for name in names)


def remarks(beside: Beside, parts: str) -> list[str]:
    """What to tell of the tensors beside the model."""

    def extent(tensors: dict[str, TensorInfo]) -> str:
        return (
            f"{len(tensors)} tensors, "
            f"{human(sum(info.end - info.start for info in tensors.values()))}"
        )

    said = []
    if beside.towers and parts == "text":
        said.append(
            f"the vision or audio tower ({extent(beside.towers)}) is dropped, as mlx-lm does; "
            "--parts all keeps it"
        )
    if beside.mtp:
        said.append(
            f"the blocks for multi-token prediction ({extent(beside.mtp)}) are dropped, as mlx-lm "
            "does"
        )
    if parts == "all" and not beside.towers:
        said.append("this model has no vision or audio tower: --parts all adds nothing")
    return said
