"""`mint-mlx speed`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import JsonOpt, ModelArg, RecipeOpt, SpeedTableOpt, start

if TYPE_CHECKING:
    from ..base.quant_config import QuantConfig
    from ..jobs.speed import SpeedReport
    from ..runtime.speed_table import SpeedTable


def speed(
    model: ModelArg,
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="Tokens in the cache while a token is decoded.")
    ] = 8192,
    speed_table: SpeedTableOpt = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the table, for other machines to plan with."),
    ] = None,
    recipe: RecipeOpt = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing table.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure what a model's layers cost on this machine, and predict its tokens per second.

    See docs/guides/speed.md. It takes two minutes at most and needs no weights.
    """
    output = start(as_json, long=True)
    from ..jobs.speed import speed as measure
    from ..jobs.speed import summary
    from ..runtime.speed_table import figure

    report = measure(
        model,
        context=context,
        table=speed_table,
        save=save,
        recipe=recipe,
        force=force,
        report=output,
    )
    output.close()
    table = report.table
    used = ", ".join(f"{name} {number}" for name, number in table.versions.items())
    how = "estimated from bytes and shapes, nothing was measured" if table.estimated else used
    output.line(f"{report.name} on {table.machine} ({how})")
    output.table(*kind_lines(report), "milliseconds of one token")
    if not table.estimated:
        output.table(*batch_lines(report), "milliseconds of so many tokens at once")
    for label, predicted in report.speeds.items():
        output.line(f"{label}: {predicted} tokens/s at a context of {report.context} tokens")
    if "as stored" not in report.speeds:
        output.line(
            "as stored: not predicted, since MLX can't run one of its layers on this device"
        )
    if report.prompt_band is not None:
        low, high = map(figure, report.prompt_band)
        output.line(f"Blocks' layers alone read a prompt at {low} to {high} tokens/s at all bits")
    elif report.prompt is not None:
        output.line(
            f"Blocks' layers alone read a prompt at {report.prompt:.3g} tokens/s (uniform 4bit-g64)"
        )
    if save is not None:
        output.line(f"{save}: written")
    output.result(summary(report))


def kind_lines(report: SpeedReport) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of each kind of layer for one token, at one group size of each width."""
    from ..runtime.speed_table import kind_of

    shown = _shown(report.table)
    lines = []
    for kind, times in sorted(report.table.layers.items()):
        count = sum(kind_of(layer) == kind for layer in report.inventory.layers)
        if not count:
            continue
        cells = []
        for configs in shown.values():
            timing = next((times[c][1] for c in configs if 1 in times.get(c, {})), None)
            cells.append("-" if timing is None else f"{timing.seconds * 1e3:.3g}")
        lines.append([str(kind), str(count), *cells])
    return ["weight", "layers", *shown], lines


def _shown(table: SpeedTable) -> dict[str, list[QuantConfig]]:
    """The columns of a table: configurations of one width, the usual group size first."""
    timed = {config for times in table.layers.values() for config in times}
    columns: dict[str, list[QuantConfig]] = {}
    for config in sorted(timed, key=lambda c: (c.bits, c.mode, abs(c.group_size - 64))):
        name = f"{config.bits}bit" if config.mode == "affine" else str(config)
        columns.setdefault(name, []).append(config)
    return columns


def batch_lines(report: SpeedReport) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of each kind of layer at uniform 4bit-g64, by tokens at once."""
    from ..allocation.pace import BASELINE
    from ..allocation.uniform import comparable_choice
    from ..runtime.speed_table import BATCHES, LayerKind, kind_of

    choice = comparable_choice(report.inventory, BASELINE)
    lines: dict[LayerKind, list[str]] = {}
    for layer in report.inventory.layers:
        kind = kind_of(layer)
        if kind is None or kind in lines:
            continue
        times = report.table.layers[kind].get(choice[layer.path], {})
        cells = [f"{times[b].seconds * 1e3:.3g}" if b in times else "-" for b in BATCHES]
        lines[kind] = [str(kind), str(choice[layer.path]), *cells]
    return ["weight", "as", *(f"{batch}" for batch in BATCHES)], [lines[k] for k in sorted(lines)]
