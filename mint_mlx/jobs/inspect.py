"""What a model, a profile or a plan holds, layer by layer."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..allocation.plan import Plan
from ..allocation.plan_file import read_plan
from ..base.errors import MintError
from ..base.files import PLAN_FILE
from ..base.one_line import one_line
from ..base.quant_config import KEEP, QuantConfig
from ..base.units import count, human
from ..base.versions import versions
from ..base.yamlfile import read_yaml
from ..checkpoint.layers import Inventory, Layer
from ..checkpoint.row_reader import straight_layers
from ..checkpoint.towers import with_towers
from ..converters.sources.layouts import describe
from ..measure.grid import find_grids
from ..measure.profile import Profile
from ..measure.profile_file import load_profile
from .model import Job, prepare


@dataclass(frozen=True)
class LayerInfo:
    """One layer.

    Attributes:
        path: of its module.
        role: such as `attention` or `router`; `-` where a plan doesn't state it.
        shape: of its weight; None in a plan, which states none.
        weights: how many it has.
        config: its quantization.
        bytes: on disk, under that.
        worst: NMSE of its worst expert, where it is known.
        guard: what protects it, in words, or None.
        grid: that its 16-bit weights lie on already, such as `4bit-g32`, or None.
    """

    path: str
    role: str
    shape: tuple[int, ...] | None
    weights: int
    config: QuantConfig
    bytes: int
    worst: float | None = None
    guard: str | None = None
    grid: QuantConfig | None = None


@dataclass(frozen=True, repr=False)
class InspectedModel:
    """A checkpoint as it is stored.

    Attributes:
        name: the Hub id, or the folder's name.
        model_type: of its config.
        bytes: of all safetensors files.
        parameters: numbers in them, those that mlx-lm leaves out as well.
        plan: its layers' quantization as a plan.
        inventory: its layers and other tensors, towers included.
        source_format: what it is quantized with, where that isn't MLX's.
        mtp_bytes: of blocks for multi-token prediction, which mlx-lm leaves out.
        layers: in the model's order.
    """

    name: str
    model_type: str
    bytes: int
    parameters: int
    plan: Plan
    inventory: Inventory
    source_format: str | None
    mtp_bytes: int
    layers: tuple[LayerInfo, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits of all files over the number of weights."""
        return self.bytes * 8 / self.parameters

    def __repr__(self) -> str:
        bits = f"{self.bits_per_weight:.2f} bits per weight"
        return one_line(self, self.name, human(self.bytes), bits, f"{len(self.layers)} layers")

    def data(self) -> dict[str, Any]:
        """The same as one JSON object."""
        layers = {
            layer.path: {
                "role": layer.role,
                "shape": list(layer.shape or ()),
                "as": str(layer.config),
                "bytes": layer.bytes,
                "guard": layer.guard,
            }
            | ({"grid": str(layer.grid)} if layer.grid else {})
            for layer in self.layers
        }
        return {
            "source": self.plan.origin.source,
            "parameters": self.inventory.parameters,
            "active_bytes": self.inventory.active_bytes(self.plan.choice),
            "layers": layers,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
        }


@dataclass(frozen=True, repr=False)
class InspectedPlan:
    """A plan's file. It knows no model: sizes are those that the file states.

    Attributes:
        path: the file.
        plan: what it says.
        layers: in the file's order.
    """

    path: Path
    plan: Plan
    layers: tuple[LayerInfo, ...]

    def __repr__(self) -> str:
        return one_line(
            self,
            self.plan.origin.source or "any source",
            f"{len(self.layers)} layers",
            self.plan.quantizer,
            f"path={str(self.path)!r}",
        )

    def data(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return {
            "source": self.plan.origin.source,
            "quantizer": self.plan.quantizer,
            "layers": {layer.path: str(layer.config) for layer in self.layers},
        }


@dataclass(frozen=True, repr=False)
class InspectedProfile:
    """A profile's file.

    Attributes:
        profile: what it says.
    """

    profile: Profile

    def __repr__(self) -> str:
        return one_line(
            self,
            self.profile.origin.source,
            f"{len(self.profile.curves)} layers",
            f"{count(self.profile.inventory.parameters)} parameters",
        )

    def data(self) -> dict[str, Any]:
        """The same as one JSON object."""
        origin = self.profile.origin
        curves = {
            path: {
                str(config): {
                    "mean_nmse": float(curve.of(config).mean()),
                    "worst_nmse": float(curve.of(config).max()),
                }
                for config in curve.configs
            }
            for path, curve in self.profile.curves.items()
        }
        return {"source": origin.source, "fingerprint": origin.fingerprint, "layers": curves}


def inspect(target: str | Path) -> InspectedModel | InspectedPlan | InspectedProfile:
    """Read what a model (a folder or a Hub id), a profile (.json) or a plan (.yaml) holds.

    Raises:
        MintError: it is none of these.
    """
    path = Path(os.path.expanduser(target))  # (pathlib raises for a user that doesn't exist)
    if not path.is_file():
        return _inspect_model(str(target))
    if path.suffix in (".yaml", ".yml"):
        return _inspect_plan(path)
    if path.suffix == ".json":
        return InspectedProfile(load_profile(path))
    raise MintError(f"{path} is neither a model's folder nor a profile (.json) nor a plan (.yaml)")


def _inspect_model(model: str) -> InspectedModel:
    """A checkpoint, from headers alone."""
    job = prepare(model, weights=False)
    source = job.source
    plan = stored_plan(job)

    # Our own checkpoints have the errors in their plan; others have none, or another one.
    with suppress(MintError):
        written = read_plan(source.path / PLAN_FILE)
        if written.choice == plan.choice:
            plan = replace(
                plan, errors=written.errors, speed=written.speed, speed_goal=written.speed_goal
            )

    # Weights that are here tell whether they were quantized before.
    inventory = with_towers(job.inventory, job.unused.towers)
    grids = _grids(job)
    return InspectedModel(
        name=source.name,
        model_type=source.config["model_type"],
        bytes=source.weight_bytes,
        parameters=job.inventory.parameters + job.unused.parameters(job.source.config),
        plan=plan,
        inventory=inventory,
        source_format=describe(source.config, source.path, source.headers) or None,
        mtp_bytes=sum(info.end - info.start for info in job.unused.mtp.values()),
        layers=tuple(_layer_info(layer, plan, grids.get(layer.path)) for layer in inventory.layers),
    )


def stored_plan(job: Job) -> Plan:
    """What a checkpoint is stored as now, as a plan; its errors aren't known."""
    choice = {layer.path: layer.stored or KEEP for layer in job.inventory.layers}
    return Plan(job.source.origin, choice, recipe="as stored", versions=versions())


def _grids(job: Job) -> dict[str, QuantConfig]:
    """The grid of each layer that lies on one, where the layer can be read by rows."""
    if not job.source.has_weights:
        return {}
    grids = {}
    layers = {layer.path: layer for layer in job.inventory.layers}
    for path, rows in straight_layers(job.source, job.inventory.layers).items():
        layer = layers[path]
        if grids_of_layer := find_grids(partial(rows.read, job.source, layer), layer.as_experts):
            grids[path] = grids_of_layer[0]
    return grids


def _layer_info(layer: Layer, plan: Plan, grid: QuantConfig | None = None) -> LayerInfo:
    """A layer of a model under a plan."""
    config = plan.choice[layer.path]
    error = plan.errors.get(layer.path)
    return LayerInfo(
        path=layer.path,
        role=layer.role,
        shape=layer.shape,
        weights=layer.size,
        config=config,
        bytes=layer.bytes(config),
        worst=error.worst if error else None,
        guard=layer.keep or (f"{layer.floor} bits or more" if layer.floor else None),
        grid=grid,
    )


def _inspect_plan(path: Path) -> InspectedPlan:
    """A plan's file, with what its lines state."""
    plan = read_plan(path)
    stated = {entry["layer"]: entry for entry in read_yaml(path, "plan")[0]["layers"]}
    layers = []
    for layer, config in plan.choice.items():
        entry = stated[layer]
        error = plan.errors.get(layer)
        layers.append(
            LayerInfo(
                path=layer,
                role=str(entry.get("role", "-")),
                shape=None,
                weights=_whole_number(entry.get("weights")),
                config=config,
                bytes=_whole_number(entry.get("bytes")),
                worst=error.worst if error else None,
            )
        )
    return InspectedPlan(path, plan, tuple(layers))


def _whole_number(value: Any) -> int:
    """A number that a plan's line states; 0 where it states none."""
    return value if isinstance(value, int) else 0
