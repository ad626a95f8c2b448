"""`mint-mlx inspect`: a model, a profile or a plan, layer by layer."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..allocation.plan import Plan
from ..allocation.plan_file import read_plan
from ..base.errors import MintError
from ..base.files import PLAN_FILE
from ..base.quant_config import QuantConfig
from ..base.units import both, count, human
from ..base.yamlfile import read_yaml
from ..checkpoint.layers import Inventory
from ..checkpoint.towers import with_towers
from ..converters.sources.layouts import describe
from ..jobs.model import prepare
from ..measure.profile import Profile, sqnr_db
from ..measure.profile_file import load_profile
from . import tables
from .output import Output


def show(target: str, output: Output) -> None:
    """Print what a model, a profile (.json) or a plan (.yaml) holds.

    Raises:
        MintError: it is none of these.
    """
    path = Path(os.path.expanduser(target))
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        _show_plan(path, read_plan(path), output)
    elif path.is_file() and path.suffix == ".json":
        _show_profile(load_profile(path), output)
    elif path.is_file():
        raise MintError(
            f"{path} is neither a model's folder nor a profile (.json) nor a plan (.yaml)"
        )
    else:
        _show_model(target, output)


def _show_model(target: str, output: Output) -> None:
    job = prepare(target, weights=False)
    plan = tables.stored_plan(job)
    written = job.source.path / PLAN_FILE  # our own checkpoints carry the errors in their plan
    with suppress(MintError):  # none, or one that can't be read
        if (made := read_plan(written)).choice == plan.choice:
            plan = replace(plan, errors=made.errors)
    inventory = with_towers(job.inventory, job.unused.towers)
    size, parameters = job.source.weight_bytes, job.inventory.parameters + job.unused.parameters
    bits = size * 8 / parameters
    output.line(
        f"{job.source.name}: {job.source.config['model_type']}, {count(parameters)} parameters, "
        f"{both(size)}, {bits:.2f} bits per weight, {inventory.blocks} blocks"
    )
    if told := describe(job.source.config, job.source.path, job.source.headers):
        output.line(f"It {told}; the tables show what that becomes.")
    if mtp := sum(info.end - info.start for info in job.unused.mtp.values()):
        output.line(
            f"The tables lack {human(mtp)} for multi-token prediction, which mlx-lm leaves out."
        )
    _show_layers(plan, inventory, output)
    output.result(_data(plan, inventory) | {"bytes": size, "bits_per_weight": bits})


def _show_plan(path: Path, plan: Plan, output: Output) -> None:
    """A plan alone knows no model: sizes are shown as the file states them."""
    stated = {entry["layer"]: entry for entry in read_yaml(path, "plan")[0]["layers"]}
    layers: list[tables.LayerRow] = []
    table: dict[QuantConfig, list[int]] = {}
    for layer, config in plan.choice.items():
        size, weights = (
            value if isinstance(value := stated[layer].get(key), int) else 0
            for key in ("bytes", "weights")
        )
        error = plan.errors.get(layer)
        role = str(stated[layer].get("role", "-"))
        layers.append(
            tables.LayerRow(
                layer, role, count(weights), str(config), size, error.worst if error else None
            )
        )
        row = table.setdefault(config, [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + weights, row[2] + size
    output.line(
        f"{path}: plan for {plan.origin.source or 'any source'}, {len(plan.choice)} layers, "
        f"quantizer {plan.quantizer}"
    )
    columns, rows = tables.layer_table(layers)
    columns = ["weights each" if column == "shape" else column for column in columns]
    sums: list[list[Any]] = [
        [str(c), n, count(w), human(b)] for c, (n, w, b) in sorted(table.items())
    ]
    if plan.edited:
        output.note(
            "it was edited: `mint-mlx convert MODEL --plan FILE --dry-run` says what it makes"
        )
    stale = ("bytes", "SQNR dB") if plan.edited else ()  # those of what was chosen before
    for names, body in ((columns, rows), (["as", "layers", "weights", "bytes"], sums)):
        shown = [i for i, name in enumerate(names) if name not in stale]
        output.table([names[i] for i in shown], [[row[i] for i in shown] for row in body])
    output.result(
        {
            "source": plan.origin.source,
            "quantizer": plan.quantizer,
            "layers": {p: str(c) for p, c in plan.choice.items()},
        }
    )


def _show_profile(profile: Profile, output: Output) -> None:
    """SQNR of the worst expert for each bit width, at the first of groups 64, 32, 128 that the
    layer takes.
    """
    inventory = profile.inventory
    output.line(
        f"a profile of {profile.origin.source}: {len(profile.curves)} layers, "
        f"{count(inventory.parameters)} parameters{profile.sampled}"
    )
    measured = {c for curve in profile.curves.values() for c in curve.configs}
    names = sorted({f"{c.bits}bit" if c.mode == "affine" else c.mode for c in measured})
    rows: list[list[Any]] = []
    for layer in inventory.layers:
        curve, group = profile.curves[layer.path], "-"
        cells: dict[str, str] = {}
        for config in sorted(curve.configs, key=lambda c: (64, 32, 128, 16).index(c.group_size)):
            name = f"{config.bits}bit" if config.mode == "affine" else config.mode
            group = str(config.group_size) if group == "-" else group
            cells.setdefault(name, f"{sqnr_db(float(curve.of(config).max())):.1f}")
        rows.append([layer.path, layer.role, group, *(cells.get(name, "-") for name in names)])
    output.table(
        ["layer", "role", "group", *names],
        rows,
        "SQNR in dB of the worst expert (--json has every candidate)",
    )
    curves = {
        path: {
            str(c): {"mean_nmse": float(k.of(c).mean()), "worst_nmse": float(k.of(c).max())}
            for c in k.configs
        }
        for path, k in profile.curves.items()
    }
    output.result(
        {
            "source": profile.origin.source,
            "fingerprint": profile.origin.fingerprint,
            "layers": curves,
        }
    )


def _show_layers(plan: Plan, inventory: Inventory, output: Output) -> None:
    output.table(*tables.layer_table(tables.plan_rows(plan, inventory)))
    output.table(*tables.config_rows(plan, inventory))


def _data(plan: Plan, inventory: Inventory) -> dict[str, Any]:
    layers = {
        layer.path: {
            "role": layer.role,
            "shape": list(layer.shape),
            "as": str(plan.choice[layer.path]),
            "bytes": layer.bytes(plan.choice[layer.path]),
            "guard": layer.keep or (f"{layer.floor} bits or more" if layer.floor else None),
        }
        for layer in inventory.layers
    }
    return {
        "source": plan.origin.source,
        "parameters": inventory.parameters,
        "active_bytes": inventory.active_bytes(plan.choice),
        "layers": layers,
    }
