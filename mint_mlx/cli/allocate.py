"""`mint-mlx allocate`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import UsageError
from .options import (
    GuardsOpt,
    JsonOpt,
    MinSpeedOpt,
    ObjectiveOpt,
    OverrideOpt,
    RecipeOpt,
    SpeedOpt,
    SpeedTableOpt,
    start,
)

if TYPE_CHECKING:
    from ..jobs.steps import Allocation
    from .output import Output


def allocate(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE", help="What `mint-mlx profile` wrote, or a checkpoint that holds one."
        ),
    ],
    budget: Annotated[
        str, typer.Option(metavar="SIZE", help="19GB, 17.5GiB, 4.5bpw, smallest, ...")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="PLAN", help="File to write; stdout otherwise."),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ORG/NAME",
            help="What `mint-mlx sensitivity` wrote, or a checkpoint that holds one.",
        ),
    ] = None,
    min_speed: MinSpeedOpt = None,
    speed: SpeedOpt = None,
    speed_table: SpeedTableOpt = None,
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="Context at which it decodes so fast.")
    ] = 8192,
    recipe: RecipeOpt = None,
    objective: ObjectiveOpt = None,
    override: OverrideOpt = None,
    ignore_guards: GuardsOpt = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plan.")] = False,
    emit: Annotated[
        str | None,
        typer.Option(metavar="mlx", help="`mlx` prints the quantization block of a config.json."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Choose bits and group size of every layer for a size: writes a plan that you can edit.

    See docs/guides/edit-a-plan.md.
    """
    output = start(as_json)
    import json

    from ..allocation.search_space import parse_override
    from ..base.units import parse_budget

    # Words are refused before MLX is imported, which takes seconds.
    if emit not in (None, "mlx"):
        raise UsageError(f"--emit must be mlx (got {emit})")
    parse_budget(budget)
    for text in override or []:
        parse_override(text)

    from ..allocation.plan_file import plan_text
    from ..jobs import steps

    allocation = steps.allocate(
        profile,
        budget,
        out,
        recipe=recipe,
        objective=objective,
        overrides=override or [],
        ignore_guards=ignore_guards,
        force=force,
        sensitivity=sensitivity,
        min_speed=min_speed,
        speed=speed,
        speed_table=speed_table,
        context=context,
    )
    plan = allocation.plan
    if emit == "mlx":
        print(json.dumps(plan.quantization(), indent=4))
        return
    if out is None:
        output.line(plan_text(plan, allocation.inventory).rstrip())
    else:
        _print_next(allocation, out, profile, sensitivity, output)
    output.result(
        {
            "bytes": allocation.bytes,
            "budget_bytes": plan.budget_bytes,
            "objective": plan.objective,
            "loss": plan.loss,
            "expected_kl": allocation.expected_kl,
            "expected_kl_band": allocation.expected_kl_band,
            "gap": plan.gap,
            **({"predicted_speed": asdict(plan.speed)} if plan.speed else {}),
            "plan": str(out) if out else None,
            "layers": {path: str(config) for path, config in plan.choice.items()},
        }
    )


def _print_next(
    allocation: Allocation, out: Path, profile: str, sensitivity: str | None, output: Output
) -> None:
    """What was written, and the command that carries it out."""
    from ..base.units import both
    from ..rules.efforts import expectation
    from ..rules.objectives import needs_sensitivity
    from ..runtime.speed_table import describe_speed

    plan = allocation.plan
    output.line(
        f"{out}: {both(allocation.bytes)}, {allocation.bits_per_weight:.2f} bits per weight, "
        f"within {plan.gap:.3%} of the best "
        f"possible{expectation(plan.objective, plan.quantizer, plan.loss)}"
    )
    if plan.speed is not None:
        output.line(f"decodes {describe_speed(plan.speed)}")

    # A sensitivity that wasn't named stood beside the profile.
    used = sensitivity or (profile if needs_sensitivity(plan.objective) else None)
    option = f" --sensitivity {shlex.quote(used)}" if used else ""
    output.line(f"Next: mint-mlx convert MODEL --plan {shlex.quote(str(out))}{option}")
