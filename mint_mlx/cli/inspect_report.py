"""Prints what `inspect` read: a model, a plan or a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..base.errors import UsageError
from ..base.quant_config import QuantConfig
from ..base.units import both, count, human
from ..jobs.inspect import InspectedModel, InspectedPlan, InspectedProfile
from ..measure.curve import sqnr_db
from . import tables
from .output import Output

GROUPS = (64, 32, 128, 16)  # of candidates, the first that a layer takes is shown


def show(inspected: InspectedModel | InspectedPlan | InspectedProfile, output: Output) -> None:
    """Print it for people, or as one JSON object."""
    if isinstance(inspected, InspectedModel):
        _show_model(inspected, output)
    elif isinstance(inspected, InspectedPlan):
        _show_plan(inspected, output)
    else:
        _show_profile(inspected, output)
    output.result(inspected.data())


def draw(inspected: InspectedModel | InspectedPlan | InspectedProfile, path: Path) -> None:
    """Draw the layers of a model or a plan.

    Raises:
        UsageError: a profile has many candidates a layer, and no choice to draw.
    """
    from ..eval.pictures.heat_map import heat_map
    from ..eval.pictures.style import draw_to

    if isinstance(inspected, InspectedProfile):
        raise UsageError("--plot draws a model or a plan: `mint-mlx sweep --plot` draws a profile")
    size = sum(layer.bytes for layer in inspected.layers)
    weights = sum(layer.weights for layer in inspected.layers)
    name = inspected.plan.origin.source or "a plan"
    if isinstance(inspected, InspectedModel):
        name, size, weights = inspected.name, inspected.bytes, inspected.parameters
    bits = f", {size * 8 / weights:.2f} bpw" if weights else ""
    draw_to(heat_map(inspected.layers, f"{name}: {human(size)}{bits}"), path)


def _show_model(model: InspectedModel, output: Output) -> None:
    output.line(
        f"{model.name}: {model.model_type}, {count(model.parameters)} parameters, "
        f"{both(model.bytes)}, {model.bits_per_weight:.2f} bits per weight, "
        f"{model.inventory.blocks} blocks"
    )
    if model.source_format:
        output.line(f"It {model.source_format}; the tables show what that becomes.")
    if model.mtp_bytes:
        output.line(
            f"The tables lack {human(model.mtp_bytes)} for multi-token prediction, which mlx-lm "
            "leaves out."
        )
    output.table(*tables.layer_lines(model.layers))
    output.table(*tables.config_lines(model.plan, model.inventory))


def _show_plan(inspected: InspectedPlan, output: Output) -> None:
    """A plan's layers and sums; of an edited one without what was stated of the first choice."""
    plan = inspected.plan
    output.line(
        f"{inspected.path}: plan for {plan.origin.source or 'any source'}, "
        f"{len(plan.choice)} layers, quantizer {plan.quantizer}"
    )
    if plan.edited:
        output.note(
            "it was edited: `mint-mlx convert MODEL --plan FILE --dry-run` says what it makes"
        )
    stale = ("bytes", "SQNR dB") if plan.edited else ()
    for columns, lines in (tables.layer_lines(inspected.layers), _config_sums(inspected)):
        shown = [i for i, name in enumerate(columns) if name not in stale]
        output.table([columns[i] for i in shown], [[line[i] for i in shown] for line in lines])


def _config_sums(inspected: InspectedPlan) -> tuple[list[str], list[tables.Line]]:
    """Layers, weights and bytes by configuration, as the plan's lines state them."""
    sums: dict[QuantConfig, list[int]] = {}
    for layer in inspected.layers:
        line = sums.setdefault(layer.config, [0, 0, 0])
        line[0] += 1
        line[1] += layer.weights
        line[2] += layer.bytes
    lines: list[tables.Line] = [
        [str(config), layers, count(weights), human(size)]
        for config, (layers, weights, size) in sorted(sums.items())
    ]
    return ["as", "layers", "weights", "bytes"], lines


def _show_profile(inspected: InspectedProfile, output: Output) -> None:
    """SQNR of the worst expert for each bit width, at one group size."""
    profile = inspected.profile
    inventory = profile.inventory
    output.line(
        f"a profile of {profile.origin.source}: {len(profile.curves)} layers, "
        f"{count(inventory.parameters)} parameters{profile.sampled}"
    )
    measured = {config for curve in profile.curves.values() for config in curve.configs}
    names = sorted({_width(config) for config in measured})

    lines: list[list[Any]] = []
    for layer in inventory.layers:
        curve = profile.curves[layer.path]
        configs = sorted(curve.configs, key=lambda config: GROUPS.index(config.group_size))
        group = str(configs[0].group_size) if configs else "-"
        cells: dict[str, str] = {}
        for config in configs:
            cells.setdefault(_width(config), f"{sqnr_db(float(curve.of(config).max())):.1f}")
        lines.append([layer.path, layer.role, group, *(cells.get(name, "-") for name in names)])
    output.table(
        ["layer", "role", "group", *names],
        lines,
        "SQNR in dB of the worst expert (--json has every candidate)",
    )


def _width(config: QuantConfig) -> str:
    """What a column of a profile's table is called."""
    return f"{config.bits}bit" if config.mode == "affine" else config.mode
