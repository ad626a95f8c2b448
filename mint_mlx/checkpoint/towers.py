"""Tensors of released checkpoints besides the language model: towers and multi-token prediction.

mlx-lm drops both. A text model (`--parts text`) then doesn't declare them in its config.json
either; `--parts all` copies the tensors of a vision or audio tower as they are, for loaders that
use them (mlx-vlm); mlx-lm drops them again. `--parts mtp`, and `all` too, copies the blocks for
multi-token prediction into mtp.safetensors in the source's names, where oMLX and mlx-optiq look for
them; `--parts mtp-8bit` writes them in 8 bits (mtp_codes.py). Stock mlx-lm loads model*.safetensors
only; mlx-vlm what the index lists. It must not list that file: mlx-vlm's class of Qwen3.5 takes a
checkpoint with such tensors for an original, and adds 1 to all norms.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..base.errors import MintError, UsageError
from ..base.files import MTP_FILE
from ..base.hf_config import HALVES, edit_text_config, text_config
from ..base.quant_config import default_entry, layer_entries
from ..base.safetensors_header import TensorInfo
from ..base.units import human
from .block_path import block_of
from .layers import FLOATS, MLX_DTYPES, Inventory
from .layout import TensorSpec
from .mtp_codes import IN_8_BITS
from .roles import TOWER
from .vlm_keys import tower_name

PARTS = ("text", "mtp", IN_8_BITS, "all")
TOWERS = {"vision_config": r"vision|visual|image", "audio_config": r"audio|speech"}
MTP_KEYS = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_transformer_layers",
    "use_mtp",
)
_TOWER_KEY = re.compile(
    r"(use_unified_)?"
    r"(vision|visual|video|image|img|media|audio|speech|boi|eoi|boa|eoa|multi_?modal|mm|projector)"
    r"_\w+"
)


def check_parts(parts: str) -> None:
    """Refuse an unknown value of --parts (a UsageError)."""
    if parts not in PARTS:
        raise UsageError(f"--parts must be {', '.join(PARTS[:-1])} or {PARTS[-1]} (got {parts})")


@dataclass(frozen=True)
class UnusedTensors:
    """Tensors of a source that its language model doesn't use, by name."""

    towers: dict[str, TensorInfo]
    mtp: dict[str, TensorInfo]

    def keeps_mtp(self, parts: str) -> bool:
        """Whether the blocks for multi-token prediction are among these parts of a model.

        With all parts a tower is what is asked for: blocks of a type that can't be copied, as FP8,
        are left out then.
        """
        return parts in ("mtp", IN_8_BITS) or (parts == "all" and self.mtp_can_be_copied)

    @property
    def mtp_can_be_copied(self) -> bool:
        """Whether the blocks for multi-token prediction are of 16 or 32 bits.

        A result's config.json doesn't say how packed ones are read.
        """
        return all(info.dtype in FLOATS for info in self.mtp.values())

    def parameters(self, config: dict[str, Any]) -> int:
        """How many weights they hold, for figures that count all bytes of a source.

        Args:
            config: the source's, which says how many bits those have that are packed.
        """
        owners = [name.removesuffix(".scales") for name in self.towers if name.endswith(".scales")]
        packed = _stated(config, owners)
        count = 0
        for name, info in [*self.towers.items(), *self.mtp.items()]:
            owner, _, leaf = name.rpartition(".")
            if owner in packed and leaf == "weight":
                count += prod(info.shape) * 32 // (packed[owner].get("bits") or 4)
            elif owner not in packed or leaf not in ("scales", "biases"):
                count += prod(info.shape)
        return count


def find_unused(
    headers: Iterable[dict[str, TensorInfo]], config: dict[str, Any], inventory: Inventory
) -> UnusedTensors:
    """The tensors of towers and of multi-token prediction that mlx-lm's model leaves out.

    Those of towers have the names that they get in a result.
    """
    used = set(inventory.order)
    towers: dict[str, TensorInfo] = {}
    mtp: dict[str, TensorInfo] = {}
    for table in headers:
        for name, info in table.items():
            if name.rpartition(".")[0] in used:
                continue
            if TOWER.search(name):
                towers[tower_name(config, name)] = info
            elif is_mtp(name, config):
                mtp[name] = info
    return UnusedTensors(towers, mtp)


def is_mtp(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is for multi-token prediction: by name, or in a block beyond the depth."""
    if re.search(r"(^|\.)mtp", name):
        return True
    depth = text_config(config).get("num_hidden_layers")
    block = block_of(name)
    beyond = type(depth) is int and block is not None and block >= depth
    return beyond and not TOWER.search(name)


def with_towers(
    inventory: Inventory, towers: dict[str, TensorInfo], half: str | None = None
) -> Inventory:
    """An inventory with tensors that mlx-lm's model lacks, as they are in the source.

    Args:
        inventory: of the language model.
        towers: the tensors, of a tower or for multi-token prediction.
        half: the code of the type that 16-bit ones are written in; their own by default.

    Raises:
        MintError: one is of a type that MLX can't hold.
    """
    owned: dict[str, list[TensorSpec]] = {}
    for name, info in towers.items():
        if info.dtype not in MLX_DTYPES:
            raise MintError(
                f"{name} is of type {info.dtype}, which cannot be copied as it is: leave it out "
                "with --parts text"
            )
        owned.setdefault(name.rpartition(".")[0], []).append(
            TensorSpec(
                name, half if half and info.dtype in HALVES.values() else info.dtype, info.shape
            )
        )
    carried = tuple(owned)
    others = inventory.others | {owner: tuple(specs) for owner, specs in owned.items()}
    order = inventory.order + carried
    return replace(inventory, others=others, order=order, carried=inventory.carried + carried)


def tower_entries(config: dict[str, Any], inventory: Inventory) -> dict[str, dict[str, Any]]:
    """Entries of a `quantization` for modules of a tower that stay packed, by name in a result.

    mlx-vlm quantizes towers too. What the source says of all modules need not be what the result
    says of them.
    """
    if "quantization" not in config:
        return {}
    owners = [
        owner
        for owner in inventory.carried
        if any(spec.name == f"{owner}.scales" for spec in inventory.others[owner])
    ]
    return _stated(config, owners)


def _stated(config: dict[str, Any], owners: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What an MLX checkpoint's `quantization` says of modules, by their names in a result."""
    default = default_entry(config)
    entries = {
        tower_name(config, f"{path}.").removesuffix("."): entry
        for path, entry in layer_entries(config).items()
        if isinstance(entry, dict)
    }
    return {owner: entries.get(owner, default) for owner in owners}


def text_only(config: dict[str, Any], needed: Collection[str]) -> dict[str, Any]:
    """A config without the keys that describe towers.

    Args:
        config: the source's.
        needed: keys that the model class can't do without, which stay.
    """
    text = {
        key: value
        for key, value in config.items()
        if key in needed or not _TOWER_KEY.fullmatch(key)
    }
    if text.keys() != config.keys() and isinstance(config.get("architectures"), list):
        text["architectures"] = [
            name.replace("ForConditionalGeneration", "ForCausalLM")
            for name in config["architectures"]
        ]
    return text


def without_mtp(config: dict[str, Any]) -> dict[str, Any]:
    """A config that declares no blocks for multi-token prediction."""
    edited = {
        key: type(value)(0) if key in MTP_KEYS and value else value for key, value in config.items()
    }
    return edit_text_config(edited, without_mtp)


def has_mtp(names: Iterable[str], config: dict[str, Any]) -> bool:
    """Whether any of these tensors is for multi-token prediction."""
    return any(is_mtp(name, config) for name in names)


def remarks(unused: UnusedTensors, parts: str, mtp_beside: bool = False) -> list[str]:
    """Notes for the user about the tensors besides the language model.

    Args:
        unused: these tensors.
        parts: what is asked for.
        mtp_beside: whether blocks for multi-token prediction lie in a file that isn't read.
    """

    def extent(tensors: dict[str, TensorInfo]) -> str:
        size = sum(info.end - info.start for info in tensors.values())
        return f"{len(tensors)} tensors, {human(size)}"

    notes = []
    if unused.towers and parts != "all":
        notes.append(
            f"the vision or audio tower ({extent(unused.towers)}) is dropped, as mlx-lm does; "
            "--parts all keeps it"
        )
    if unused.mtp and not unused.keeps_mtp(parts):
        more = "of their type they can't be copied"
        if unused.mtp_can_be_copied:
            more = "--parts mtp keeps them"
        notes.append(
            f"the blocks for multi-token prediction ({extent(unused.mtp)}) are dropped, as mlx-lm "
            f"does; {more}"
        )
    elif unused.mtp:
        how = "written into {} in 8 bits" if parts == IN_8_BITS else "copied into {} as they are"
        notes.append(
            f"the blocks for multi-token prediction ({extent(unused.mtp)}) are "
            f"{how.format(MTP_FILE)}: oMLX and mlx-optiq look for them there, mlx-lm doesn't"
        )
    if parts == "all" and not unused.towers and not unused.mtp:
        notes.append("this model has no vision or audio tower: --parts all has no effect")
    if parts in ("mtp", IN_8_BITS) and not unused.mtp and not mtp_beside:
        notes.append(
            f"this model has no blocks for multi-token prediction: --parts {parts} has no effect"
        )
    return notes
