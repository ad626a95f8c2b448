"""What is wrong with an MLX checkpoint, ours or anyone's, from its small files and headers alone.

mint-mlx doctor mlx-community/Qwen3-30B-A3B-4bit
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx.utils import tree_flatten

from ..allocation.plan_file import read_plan
from ..base.errors import MintError
from ..base.files import PLAN_FILE
from ..base.one_line import one_line
from ..base.safetensors_header import INDEX, TensorInfo, index_notes, read_folder
from ..base.units import human
from ..checkpoint import hub, mlxlm
from ..checkpoint.config_file import read_config
from ..checkpoint.config_keys import adapt
from ..checkpoint.known_differences import known_differences
from ..checkpoint.layers import Inventory, list_layers
from ..checkpoint.source import find_model
from ..checkpoint.tokenizer import has_tokenizer
from ..checkpoint.towers import find_unused, with_towers
from ..checkpoint.vlm_keys import vlm_limits
from .findings import (
    Finding,
    claim_findings,
    config_findings,
    key_findings,
    mtp_findings,
    tensor_findings,
    tower_findings,
)


@dataclass(frozen=True, repr=False)
class Examination:
    """What is wrong with a checkpoint; without findings, nothing.

    Attributes:
        name: the Hub id, or the folder's name.
        bytes: of all safetensors files.
        bits_per_weight: None where the files can't be read.
        findings: in the order of files, config, layers, towers, name.
        known_differences: what mlx-lm computes otherwise than transformers for this family, and
            what mlx-vlm cannot load.
    """

    name: str
    bytes: int
    bits_per_weight: float | None
    findings: list[Finding]
    known_differences: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        bits = "unreadable"
        if self.bits_per_weight is not None:
            bits = f"{self.bits_per_weight:.2f} bits per weight"
        return one_line(self, self.name, human(self.bytes), bits, f"{len(self.findings)} findings")


def doctor(model: str) -> Examination:
    """Examine an MLX checkpoint: a folder or a Hub repository.

    Raises:
        MintError: there is no checkpoint of a model that mlx-lm knows (what is wrong with one is in
            the result).
    """
    place = find_model(model)
    if isinstance(place, hub.RepoId):
        folder = hub.cached(place) or hub.fetch_skeleton(place).folder
        name = place.name
    else:
        folder = place
        name = place.resolve().name

    # Without a config of a known model there is nothing to examine.
    stated = read_config(folder)
    config = adapt(stated)
    mlxlm.check_model(config)
    try:
        headers = read_folder(folder)
    except MintError as error:
        return Examination(name, 0, None, [Finding("files", str(error))])
    tensors = {tensor: info for file in headers.values() for tensor, info in file.items()}

    # What the model class has, and what stock mlx-lm makes of these files.
    bare = mlxlm.bare_model(config)
    loaded, refusal = mlxlm.stock_parameters(folder)
    names = loaded or {name for name, _ in tree_flatten(bare.parameters())}
    if "quantization" not in config and not names <= tensors.keys() and not _packed(tensors):
        raise MintError(
            f"{name} is not in mlx-lm's layout, but an original: the doctor examines MLX "
            "checkpoints"
        )
    inventory = _loaded_layers(list_layers(bare, config), loaded)
    inventory = with_towers(inventory, find_unused(headers.values(), config, inventory).towers)

    # A refusal by mlx-lm is told only where nothing explains it.
    unquantized, plan_findings = _meant_to_stay(_plan_of(folder, place))
    layer_findings = [
        *key_findings(stated, config),
        *config_findings(config, inventory),
        *tensor_findings(config, inventory, tensors, unquantized),
    ]
    if refusal and not layer_findings:
        layer_findings.append(Finding("files", f"mlx-lm cannot load them: {refusal}"))

    size = sum((folder / file).stat().st_size for file in headers)
    bits = size * 8 / inventory.parameters
    findings = [
        *_file_findings(folder, headers),
        *plan_findings,
        *layer_findings,
        *tower_findings(folder, config, inventory, tensors),
        *mtp_findings(folder, config, tensors),
        *claim_findings(name, bits),
    ]
    limits = vlm_limits(config, bool(inventory.carried), _is_copied(inventory, tensors))
    return Examination(name, size, bits, findings, [*known_differences(config), *limits])


def _loaded_layers(inventory: Inventory, loaded: set[str] | None) -> Inventory:
    """An inventory without what loading takes away, as the head of Gemma 3's class."""
    if not loaded:
        return inventory
    layers = tuple(layer for layer in inventory.layers if f"{layer.path}.weight" in loaded)
    return replace(inventory, layers=layers)


def _is_copied(inventory: Inventory, tensors: dict[str, TensorInfo]) -> bool:
    """Whether a loader copies a quantized embedding to its head, as none is stored."""
    if any(name.endswith("lm_head.weight") for name in tensors):
        return False
    embeddings = (layer.path for layer in inventory.layers if layer.role == "embedding")
    return any(f"{path}.scales" in tensors for path in embeddings)


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
    for note in index_notes(folder, headers):
        yield Finding("files", note)
    if not has_tokenizer(folder):
        yield Finding("files", "there is no tokenizer")


def _plan_of(folder: Path, model: Path | hub.RepoId) -> Path | None:
    """Our own plan of a checkpoint, if it has one. What another program downloaded lacks it."""
    if isinstance(model, hub.RepoId) and not (folder / PLAN_FILE).is_file():
        with suppress(hub.MissingFile, FileNotFoundError):  # none there, or no network
            return hub.download_file(model, PLAN_FILE)
    return folder / PLAN_FILE if (folder / PLAN_FILE).is_file() else None


def _meant_to_stay(path: Path | None) -> tuple[set[str], list[Finding]]:
    """Layers that our own plan leaves unquantized on purpose, and what is wrong with that plan."""
    if path is None:
        return set(), []
    try:
        choice = read_plan(path).choice
    except MintError as error:
        return set(), [Finding("files", str(error))]
    return {layer for layer, config in choice.items() if not config.quantized}, []
