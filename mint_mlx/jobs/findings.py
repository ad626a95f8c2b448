"""What can be wrong with an MLX checkpoint, held against its model class.

Its config, tensors, towers and name each have a function."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..base.files import MTP_FILE, MTP_PLACES, TOWER_PLACES
from ..base.hf_config import config_tables
from ..base.quant_config import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    KEYS,
    MX_MODES,
    QuantConfig,
    layer_entries,
)
from ..base.safetensors_header import INDEX, TensorInfo
from ..base.side_files import PROCESSOR
from ..checkpoint.config_keys import brought
from ..checkpoint.layers import ROUTER_BITS, Inventory, Layer
from ..checkpoint.mtp_codes import in_coded_head
from ..checkpoint.tokenizer import tokenizer_settings
from ..checkpoint.towers import MTP_KEYS, TOWERS, has_mtp, is_mtp, tower_entries
from ..checkpoint.unread_keys import unread_keys
from ..checkpoint.vlm_keys import NEEDS_PROCESSOR, PROCESSOR_CLASS, reads_null, vision_keys

_CLAIM = re.compile(r"(\d+(?:\.\d+)?)[-_ ]?(bpw|bits?)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, and in what way."""

    where: str
    problem: str


def key_findings(stated: dict[str, Any], adapted: dict[str, Any]) -> Iterator[Finding]:
    """Keys that mlx-lm's class doesn't read, so that everyone who loads this gets another model.

    Args:
        stated: config.json as it stands.
        adapted: the same, brought to the keys that the class reads.
    """
    for change in brought(stated):
        yield Finding("config.json", str(change))
    for key in unread_keys(adapted):
        yield Finding("config.json", f"says {key}")


def config_findings(config: dict[str, Any], inventory: Inventory) -> Iterator[Finding]:
    """Entries that stock loaders can't read, or that name nothing."""
    block = config.get("quantization")
    if not isinstance(block, dict):
        return

    # The global keys hold for every layer without an entry.
    for key in ("group_size", "bits"):
        if key not in block:
            yield Finding(
                "config.json", f"quantization has no {key} of its own, which mlx-lm needs"
            )
        elif type(block[key]) is not int:
            yield Finding(
                "config.json",
                f"quantization says {block[key]!r} for {key}, which is not a whole number",
            )
    if "mode" in block and not isinstance(block["mode"], str):
        yield Finding("config.json", f"quantization says {json.dumps(block['mode'])} for mode")
    if config.get("quantization_config", block) != block:
        yield Finding("config.json", "quantization and quantization_config disagree")

    layers = {layer.path: layer.kind for layer in inventory.layers}
    towers = tower_entries(config, inventory)  # that stay packed, for mlx-vlm
    for path, entry in layer_entries(config).items():
        if path in towers:
            continue
        # mlx_lm.awq says `false` of every module that has no bits, norms among them.
        if path not in layers and entry is not False and not in_coded_head(path, config):
            yield Finding(
                path, "has an entry in config.json, but the model has no such quantizable layer"
            )
        if not isinstance(entry, bool):
            yield from _entry_findings(path, entry, layers.get(path) == "experts")


def _entry_findings(path: str, entry: Any, has_experts: bool) -> Iterator[Finding]:
    """What is wrong with one layer's entry in config.json."""
    if not isinstance(entry, dict):
        yield Finding(path, f"its entry in config.json is {entry!r} instead of a table")
        return
    # Stacks of experts may have a scale for each whole expert in this mode (mlx-lm 0.32.2).
    known = KEYS | ({"global_scale"} if has_experts and entry.get("mode") == "nvfp4" else set())
    for key in sorted(set(entry) - known):
        yield Finding(path, f"its entry has the key {key!r}, which stock loaders reject")
    for key in sorted(KEYS & set(entry)):
        if entry[key] is None:
            yield Finding(path, f"its entry says null for {key}, which mlx-swift cannot decode")
        elif key != "mode" and type(entry[key]) is not int:
            yield Finding(
                path, f"its entry says {entry[key]!r} for {key}, which is not a whole number"
            )
    if not {"group_size", "bits"} <= set(entry):
        yield Finding(path, "its entry lacks group_size or bits")


def tensor_findings(
    config: dict[str, Any],
    inventory: Inventory,
    tensors: dict[str, TensorInfo],
    unquantized: set[str],
) -> Iterator[Finding]:
    """Tensors that are missing or contradict config.json, and layers of too few or many bits.

    Args:
        config: config.json.
        inventory: what the model class has.
        tensors: by name, of all shards.
        unquantized: paths of layers that are meant to have 16 bits.
    """
    block = config.get("quantization")
    block = block if isinstance(block, dict) else None
    entries = layer_entries(config)
    if block and _experts_alone(block, inventory, tensors):
        unquantized = unquantized | {layer.path for layer in inventory.layers}
    for layer in inventory.layers:
        entry = entries.get(layer.path)
        weight = tensors.get(f"{layer.path}.weight")
        scales = tensors.get(f"{layer.path}.scales")
        if weight is None:
            yield Finding(layer.path, "its weight is missing")
        elif scales is None:
            expected = block is not None and layer.path not in unquantized
            yield from _plain_findings(layer, entry, weight, expected)
        else:
            biases = f"{layer.path}.biases" in tensors
            yield from _packed_findings(layer, entry, block, (weight, scales), biases)


def _experts_alone(
    block: dict[str, Any], inventory: Inventory, tensors: dict[str, TensorInfo]
) -> bool:
    """Whether a checkpoint is a release whose experts alone are quantized."""
    packed = {layer.path for layer in inventory.layers if f"{layer.path}.scales" in tensors}
    experts = {layer.path for layer in inventory.layers if layer.kind == "experts"}
    return block.get("mode") in ("mxfp4", "mxfp8") and packed <= experts


def _plain_findings(
    layer: Layer, entry: Any, weight: TensorInfo, expected: bool
) -> Iterator[Finding]:
    """What is wrong with a layer without scales; `expected` is whether others like it have them."""
    if weight.dtype == "U32" or isinstance(entry, dict):
        yield Finding(layer.path, "is quantized by config.json, but has no scales")
    elif weight.shape != layer.shape:
        yield Finding(
            layer.path, f"has the shape {list(weight.shape)} instead of {list(layer.shape)}"
        )
    elif expected and _could_be_quantized(layer) and entry is not False:
        yield Finding(layer.path, "was silently left at 16 bits")


def _packed_findings(
    layer: Layer,
    entry: Any,
    block: dict[str, Any] | None,
    stored: tuple[TensorInfo, TensorInfo],
    biases: bool,
) -> Iterator[Finding]:
    """What is wrong with a quantized layer.

    Args:
        layer: as the model class has it.
        entry: its own entry in config.json, None without one.
        block: the quantization block of config.json.
        stored: its weight and its scales.
        biases: whether it has biases.
    """
    _, scales = stored
    real = _stored_config(layer, *stored)
    if real is None:
        yield Finding(layer.path, "its tensors fit no quantization that MLX knows")
        return

    # What config.json says decides how a loader reads the tensors.
    stated = _stated_config(entry, block)
    if entry is False:
        yield Finding(
            layer.path, f"config.json says that it is unquantized, its tensors are {real}"
        )
    elif stated is not None and stated != real:
        yield Finding(layer.path, f"config.json says {stated}, its tensors are {real}")
    if real.mode != "affine" and biases:
        yield Finding(layer.path, f"has biases, which {real} doesn't")
    if real.mode == "affine" and not biases:
        yield Finding(layer.path, "has scales but no biases")

    # What loads, but is worse than it need be.
    if layer.role == "router" and real.bits < ROUTER_BITS:
        yield Finding(
            layer.path, f"is a router of {real.bits} bits: below 8, tokens go to other experts"
        )
    if scales.dtype == "F32":
        yield Finding(layer.path, "has float32 scales, which cost twice the bytes of 16-bit ones")


def _could_be_quantized(layer: Layer) -> bool:
    return not layer.keep and layer.role != "router" and layer.shape[-1] % min(AFFINE_GROUPS) == 0


def _stored_config(layer: Layer, weight: TensorInfo, scales: TensorInfo) -> QuantConfig | None:
    """What a layer's tensors are, by their shapes and types; None where MLX has no such form."""
    # Rows must be those of the model class, in weight and scales.
    rows = weight.shape[:-1]
    if not scales.shape or prod(rows) != prod(layer.shape[:-1]) or rows != scales.shape[:-1]:
        return None
    last = layer.shape[-1]
    if scales.dtype not in ("F16", "BF16", "F32", "U8"):
        return None
    if last % scales.shape[-1] or weight.shape[-1] * 32 % last:
        return None

    # 32 bits hold so many codes, and a scale belongs to so many weights.
    bits = weight.shape[-1] * 32 // last
    group = last // scales.shape[-1]
    if scales.dtype == "U8":
        mode = next((m for m, pair in MX_MODES.items() if pair == (bits, group)), None)
        return QuantConfig(bits, group, mode) if mode else None
    if bits in AFFINE_BITS and group in AFFINE_GROUPS:
        return QuantConfig(bits, group)
    return None


def _stated_config(entry: Any, block: dict[str, Any] | None) -> QuantConfig | None:
    """What config.json says of a layer, by its entry, else the global keys; None if unreadable."""
    stated = block if entry is None else entry
    if not isinstance(stated, dict):
        return None
    bits = stated.get("bits")
    group = stated.get("group_size")
    if type(bits) is not int or type(group) is not int:
        return None
    return QuantConfig(bits, group, stated.get("mode") or "affine")


def tower_findings(
    folder: Path, config: dict[str, Any], inventory: Inventory, tensors: dict[str, TensorInfo]
) -> Iterator[Finding]:
    """Parts that config.json promises and no tensor holds, and the other way round."""
    # A tower without a word of it in the config is never loaded.
    promised = any(config.get(key) for key in TOWERS)
    if inventory.carried and not promised:
        yield Finding(
            "config.json",
            f"says nothing of a tower, but {len(inventory.carried)} modules belong to one",
        )
    processors = [file.name for pattern in PROCESSOR for file in folder.glob(pattern)]
    if processors and not promised:
        yield Finding(processors[0], "is for images or sounds, but config.json has no tower")

    # LM Studio loads every model by mlx-vlm's class of its family.
    needed = vision_keys(config)
    for key in sorted(needed - {key for key in config if config[key]}):
        yield Finding(
            "config.json",
            f"has no {key}, without which mlx-vlm and LM Studio cannot load this family: copy the "
            "original's",
        )
    for key in TOWERS:
        if key in config and config[key] is None and key not in needed | reads_null(config):
            yield Finding(
                "config.json",
                f"says null for {key}, which mlx-vlm and LM Studio cannot read: leave the key out",
            )
    named = tokenizer_settings(folder).get("processor_class")
    if config.get("model_type") in NEEDS_PROCESSOR and not processors and named != PROCESSOR_CLASS:
        yield Finding(
            "tokenizer_config.json",
            "mlx-vlm and LM Studio look for a processor of images, and there is none: say "
            f'"processor_class": "{PROCESSOR_CLASS}" there',
        )

    # What is advertised and not there fails in programs that load it.
    for key, pattern in TOWERS.items():
        if key in needed:
            continue
        if config.get(key) and not any(re.search(pattern, name) for name in tensors):
            beside = _present(folder, TOWER_PLACES)
            where = f" that lies in {beside}, which mlx-optiq alone reads"
            nowhere = ", but no tensor belongs to one"
            problem = f"advertises a tower ({key}){where if beside else nowhere}"
            yield Finding("config.json", problem)
    has_blocks = has_mtp(tensors, config) or _present(folder, MTP_PLACES) is not None
    for table in config_tables(config):
        for key in MTP_KEYS:
            count = table.get(key)
            if isinstance(count, int) and count > 0 and not has_blocks:
                yield Finding(
                    "config.json",
                    f"advertises multi-token prediction ({key}), but no tensor belongs to it",
                )


def mtp_findings(
    folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> Iterator[Finding]:
    """A file of blocks for multi-token prediction that misleads a loader.

    mlx-vlm 0.7.10 loads what the index lists, without one every file. Its class of Qwen3.5 takes a
    checkpoint with such tensors for an original.
    """
    if not str(config.get("model_type")).startswith("qwen3_5"):
        return
    wrong = "so mlx-vlm and LM Studio take the norms for an original's, and compute another model"
    if any(is_mtp(name, config) for name in tensors):
        yield Finding(INDEX, f"lists tensors for multi-token prediction, {wrong}")
    elif (folder / MTP_FILE).is_file() and not (folder / INDEX).is_file():
        yield Finding(MTP_FILE, f"lies beside weights without an index, {wrong}")


def _present(folder: Path, places: Sequence[str]) -> str | None:
    """The first of some files that a folder has; None where it has none."""
    return next((place for place in places if (folder / place).is_file()), None)


def claim_findings(name: str, bits: float) -> Iterator[Finding]:
    """A name that promises fewer bits than the files have, or more."""
    match = _CLAIM.search(name)
    if not match:
        return
    claim = float(match[1])
    # With groups of 32, two 16-bit numbers a group cost one bit more than the codes.
    allowed = claim * 1.02 if match[2].lower() == "bpw" else claim + 1.0
    if bits < claim * 0.8:
        yield Finding(
            "name", f"says {match[0]}, but the files have only {bits:.2f} bits per weight"
        )
    if bits > allowed:
        yield Finding("name", f"says {match[0]}, but the files have {bits:.2f} bits per weight")
