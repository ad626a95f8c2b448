"""`mint-mlx doctor`: what is wrong with an MLX checkpoint, ours or anyone's, from its small files
and headers alone.

mint-mlx doctor mlx-community/Qwen3-30B-A3B-4bit
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..allocation.plan_file import read_plan
from ..base.errors import MintError
from ..base.files import PLAN_FILE
from ..base.hf_config import config_tables
from ..base.quant_config import AFFINE_BITS, AFFINE_GROUPS, MX_MODES, QuantConfig
from ..base.safetensors_header import INDEX, TensorInfo, read_folder
from ..checkpoint import hub, mlxlm
from ..checkpoint.layers import ROUTER_BITS, Inventory, Layer, list_layers
from ..checkpoint.source import find_model, read_config
from ..checkpoint.tokenizer import has_tokenizer
from ..checkpoint.towers import MTP_KEYS, PROCESSOR_FILES, TOWERS, find_unused, has_mtp, with_towers

KEYS = {"group_size", "bits", "mode"}
_CLAIM = re.compile(r"(\d+(?:\.\d+)?)[-_ ]?(bpw|bits?)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, and in what way."""

    where: str
    problem: str


@dataclass(frozen=True)
class Examination:
    """What was found in a checkpoint. No findings: nothing wrong."""

    name: str
    bytes: int
    bits_per_weight: float | None
    findings: list[Finding]


def examine(model: str) -> Examination:
    """Examine a folder or a Hub repository.

    Raises:
        MintError: there is no checkpoint of a model that mlx-lm knows (what is wrong with one is in
            the result).
    """
    from mlx.utils import tree_flatten

    found = find_model(model)
    if isinstance(found, hub.RepoId):
        folder, name = hub.cached(found) or hub.fetch_skeleton(found).folder, found.name
    else:
        folder, name = found, found.resolve().name
    config = read_config(folder)
    mlxlm.check_model(config, folder)
    try:
        headers = read_folder(folder)
    except MintError as error:
        return Examination(name, 0, None, [Finding("files", str(error))])
    tensors = {tensor: info for file in headers.values() for tensor, info in file.items()}
    size = sum((folder / file).stat().st_size for file in headers)
    bare = mlxlm.bare_model(config)
    loaded, refusal = mlxlm.stock_parameters(folder)
    names = loaded or {n for n, _ in tree_flatten(bare.parameters())}
    if "quantization" not in config and not names <= tensors.keys() and not _packed(tensors):
        raise MintError(
            f"{name} is not in mlx-lm's layout, but an original: the doctor examines MLX "
            "checkpoints"
        )
    inventory = list_layers(bare, config)
    layers = tuple(
        layer for layer in inventory.layers if not loaded or f"{layer.path}.weight" in loaded
    )
    inventory = replace(
        inventory, layers=layers
    )  # (Gemma 3's class has a head that loading takes away)
    inventory = with_towers(inventory, find_unused(headers.values(), config, inventory).towers)
    stay, damaged = _meant_to_stay(_plan_of(folder, found))
    wrong = [
        *_config_findings(config, inventory),
        *_tensor_findings(config, inventory, tensors, stay),
    ]
    if refusal and not wrong:
        wrong.append(Finding("files", f"mlx-lm cannot load them: {refusal}"))
    towers = _tower_findings(folder, config, inventory, tensors)
    findings = [*_file_findings(folder, headers), *damaged, *wrong, *towers]
    bits = size * 8 / inventory.parameters
    findings += _claim_findings(name, bits)
    return Examination(name, size, bits, findings)


def _packed(tensors: dict[str, TensorInfo]) -> bool:
    """Whether any weight stands in MLX's packed form."""
    return any(
        name.endswith(".scales") and tensors.get(f"{name[:-7]}.weight", info).dtype == "U32"
        for name, info in tensors.items()
    )


def _file_findings(folder: Path, headers: dict[str, dict[str, TensorInfo]]) -> Iterator[Finding]:
    """Files that a loader looks for."""
    if len(headers) > 1 and not (folder / INDEX).is_file():
        yield Finding("files", f"there are {len(headers)} shards, but no {INDEX}")
    if not has_tokenizer(folder):
        yield Finding("files", "there is no tokenizer")


def _plan_of(folder: Path, model: Path | hub.RepoId) -> Path | None:
    """Our own plan of a checkpoint, if it has one. What another program downloaded lacks it."""
    if isinstance(model, hub.RepoId) and not (folder / PLAN_FILE).is_file():
        with suppress(hub.MissingFile, FileNotFoundError):  # none there, or no network
            return hub.download_file(model, PLAN_FILE)
    return folder / PLAN_FILE if (folder / PLAN_FILE).is_file() else None


def _meant_to_stay(path: Path | None) -> tuple[set[str], list[Finding]]:
    """Layers that our own plan keeps unquantized on purpose, and what is wrong with that plan."""
    if path is None:
        return set(), []
    try:
        return {
            layer for layer, config in read_plan(path).choice.items() if not config.quantized
        }, []
    except MintError as error:
        return set(), [Finding("files", str(error))]


def _entries(config: dict[str, Any]) -> dict[str, Any]:
    block = config.get("quantization") or {}
    return (
        {path: entry for path, entry in block.items() if path not in KEYS}
        if isinstance(block, dict)
        else {}
    )


def _config_findings(config: dict[str, Any], inventory: Inventory) -> Iterator[Finding]:
    """Entries that stock loaders can't read, or that name nothing."""
    block = config.get("quantization")
    if not isinstance(block, dict):
        return
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
    layers = {layer.path for layer in inventory.layers}
    for path, entry in _entries(config).items():
        if path not in layers:
            yield Finding(
                path, "has an entry in config.json, but the model has no such quantizable layer"
            )
        if isinstance(entry, bool):
            continue
        if not isinstance(entry, dict):
            yield Finding(path, f"its entry in config.json is {entry!r} instead of a table")
            continue
        for key in sorted(set(entry) - KEYS):
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


def _tensor_findings(
    config: dict[str, Any], inventory: Inventory, tensors: dict[str, TensorInfo], kept: set[str]
) -> Iterator[Finding]:
    """Shapes that contradict config.json, routers of few bits, layers left at 16 bits, tensors
    missing.
    """
    block = config.get("quantization") if isinstance(config.get("quantization"), dict) else None
    entries = _entries(config)
    packed = {layer.path for layer in inventory.layers if f"{layer.path}.scales" in tensors}
    if (
        block
        and block.get("mode") in ("mxfp4", "mxfp8")
        and not packed - {x.path for x in inventory.layers if x.kind == "experts"}
    ):
        kept = kept | {
            layer.path for layer in inventory.layers
        }  # a release that is quantized in its experts only
    for layer in inventory.layers:
        weight, scales = tensors.get(f"{layer.path}.weight"), tensors.get(f"{layer.path}.scales")
        if weight is None:
            yield Finding(layer.path, "its weight is missing")
            continue
        if scales is None:
            if weight.dtype == "U32" or isinstance(entries.get(layer.path), dict):
                yield Finding(layer.path, "is quantized by config.json, but has no scales")
            elif weight.shape != layer.shape:
                yield Finding(
                    layer.path, f"has the shape {list(weight.shape)} instead of {list(layer.shape)}"
                )
            elif (
                block
                and _could_be_quantized(layer)
                and layer.path not in kept
                and entries.get(layer.path) is not False
            ):
                yield Finding(layer.path, "was silently left at 16 bits")
            continue
        found = _effective(entries.get(layer.path), block, layer, weight, scales)
        if found is None:
            yield Finding(layer.path, "its tensors fit no quantization that MLX knows")
            continue
        stated, real = found
        if entries.get(layer.path) is False:
            yield Finding(
                layer.path, f"config.json says that it is unquantized, its tensors are {real}"
            )
        elif stated is not None and stated != real:
            yield Finding(layer.path, f"config.json says {stated}, its tensors are {real}")
        if real.mode != "affine" and f"{layer.path}.biases" in tensors:
            yield Finding(layer.path, f"has biases, which {real} doesn't")
        if real.mode == "affine" and f"{layer.path}.biases" not in tensors:
            yield Finding(layer.path, "has scales but no biases")
        if layer.role == "router" and real.bits < ROUTER_BITS:
            yield Finding(
                layer.path, f"is a router of {real.bits} bits: below 8, tokens go to other experts"
            )
        if scales.dtype == "F32":
            yield Finding(
                layer.path, "has float32 scales, which cost twice the bytes of 16-bit ones"
            )


def _could_be_quantized(layer: Layer) -> bool:
    return not layer.keep and layer.role != "router" and layer.shape[-1] % min(AFFINE_GROUPS) == 0


def _effective(
    entry: Any, block: dict[str, Any] | None, layer: Layer, weight: TensorInfo, scales: TensorInfo
) -> tuple[QuantConfig | None, QuantConfig] | None:
    """What config.json says of a layer (None if nothing), and what its tensors are."""
    last = layer.shape[-1]
    if (
        not scales.shape
        or prod(weight.shape[:-1]) != prod(layer.shape[:-1])
        or weight.shape[:-1] != scales.shape[:-1]
    ):
        return None
    if (
        scales.dtype not in ("F16", "BF16", "F32", "U8")
        or last % scales.shape[-1]
        or weight.shape[-1] * 32 % last
    ):
        return None
    bits, group = weight.shape[-1] * 32 // last, last // scales.shape[-1]
    mode = "affine"
    if scales.dtype == "U8":
        mode = next((m for m, pair in MX_MODES.items() if pair == (bits, group)), "")
    elif bits not in AFFINE_BITS or group not in AFFINE_GROUPS:
        return None
    if not mode:
        return None
    told = (
        entry if isinstance(entry, dict) else block if entry is None else None
    )  # without an entry the global holds
    stated = None
    if told is not None and type(told.get("bits")) is int and type(told.get("group_size")) is int:
        stated = QuantConfig(told["bits"], told["group_size"], told.get("mode") or "affine")
    return stated, QuantConfig(bits, group, mode)


def _tower_findings(
    folder: Path, config: dict[str, Any], inventory: Inventory, tensors: dict[str, TensorInfo]
) -> Iterator[Finding]:
    """Parts that config.json promises and no tensor holds, and the other way round."""
    promised = any(config.get(key) for key in TOWERS)
    if inventory.carried and not promised:
        yield Finding(
            "config.json",
            f"says nothing of a tower, but {len(inventory.carried)} modules belong to one",
        )
    processors = [file.name for pattern in PROCESSOR_FILES for file in folder.glob(pattern)]
    if processors and not promised:
        yield Finding(processors[0], "is for images or sounds, but config.json has no tower")
    for key, pattern in TOWERS.items():
        if config.get(key) and not any(re.search(pattern, name) for name in tensors):
            yield Finding(
                "config.json", f"advertises a tower ({key}), but no tensor belongs to one"
            )
    for table in config_tables(config):
        for key in MTP_KEYS:
            count = table.get(key)
            if isinstance(count, int) and count > 0 and not has_mtp(tensors, config):
                yield Finding(
                    "config.json",
                    f"advertises multi-token prediction ({key}), but no tensor belongs to it",
                )


def _claim_findings(name: str, bits: float) -> Iterator[Finding]:
    """A name that promises fewer bits than the files have."""
    match = _CLAIM.search(name)
    if not match:
        return
    claim, unit = float(match[1]), match[2].lower()
    allowed = (
        claim * 1.02 if unit == "bpw" else claim + 1.0
    )  # g32 with two 16-bit numbers a group costs one bit
    if bits < claim * 0.8:
        yield Finding(
            "name", f"says {match[0]}, but the files have only {bits:.2f} bits per weight"
        )
    if bits > allowed:
        yield Finding("name", f"says {match[0]}, but the files have {bits:.2f} bits per weight")
