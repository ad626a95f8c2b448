"""`mint-mlx allocate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import UsageError
from .options import (
    GuardsOpt,
    JsonOpt,
    ObjectiveOpt,
    OverrideOpt,
    RecipeOpt,
    start,
)


def allocate(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE", help="What `mint-mlx profile` wrote, or a checkpoint that keeps one."
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
            help="What `mint-mlx sensitivity` wrote, or a checkpoint keeps.",
        ),
    ] = None,
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
    """Choose bits and group size of every layer for a budget: writes a plan that you can edit."""
    output = start(as_json)
    import json

    from ..allocation.plan_file import plan_text
    from ..base.units import both
    from ..jobs import steps
    from ..rules import efforts
    from ..rules.objectives import needs_sensitivity

    if emit not in (None, "mlx"):
        raise UsageError(f"--emit {emit} is unknown: there is only `--emit mlx`")
    plan, inventory = steps.plan_profile(
        profile, budget, out, recipe, objective, override or [], ignore_guards, force, sensitivity
    )
    total = plan.layout(inventory).total
    if emit == "mlx":
        print(json.dumps(plan.quantization(), indent=4))
        return
    if out is None:
        output.line(plan_text(plan, inventory).rstrip())
    else:
        bits = total * 8 / inventory.parameters
        expected = efforts.expectation(plan.objective, plan.quantizer, plan.loss)
        output.line(
            f"{out}: {both(total)}, {bits:.2f} bits per weight, within {plan.gap:.3%} of the best "
            f"possible{expected}"
        )
        weighed = sensitivity or (
            profile if needs_sensitivity(plan.objective) else None
        )  # kept beside the profile
        own = f" --sensitivity {shlex.quote(weighed)}" if weighed else ""
        output.line(f"Next: mint-mlx convert MODEL --plan {shlex.quote(str(out))}{own}")
    output.result(
        {
            "bytes": total,
            "budget_bytes": plan.budget_bytes,
            "objective": plan.objective,
            "loss": plan.loss,
            "expected_kl": efforts.expected_kl(plan.objective, plan.quantizer, plan.loss),
            "gap": plan.gap,
            "plan": str(out) if out else None,
            "layers": {path: str(config) for path, config in plan.choice.items()},
        }
    )
