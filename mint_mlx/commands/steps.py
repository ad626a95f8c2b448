"""The steps of `convert`, each a command of its own, and `refine`. Each parses, calls one function and prints."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from . import (
    STEPS,
    GuardsOpt,
    JsonOpt,
    ModelArg,
    ObjectiveOpt,
    OverrideOpt,
    PartsOpt,
    RecipeOpt,
    SampleOpt,
    TokensOpt,
    WorkDirOpt,
    app,
    start,
)


@app.command(rich_help_panel=STEPS)
def profile(
    model: ModelArg,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="PROFILE", help="File to write; NAME.profile.json otherwise.")
    ] = None,
    parts: PartsOpt = None,
    recipe: RecipeOpt = None,
    sample: SampleOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure the error of every layer at every candidate; one profile serves every budget."""
    output = start(as_json, long=True, shared=True)
    from .. import steps

    path, made = steps.write_profile(model, out, recipe, parts or "text", output, sample)
    output.close()
    output.line(f"{path}: {len(made.curves)} layers{made.sampled}")
    output.line(f"Next: mint-mlx allocate {shlex.quote(str(path))} --budget 4.5bpw -o plan.yaml")
    output.result(
        {"profile": str(path), "layers": len(made.curves), "fingerprint": made.fingerprint, "sample": made.sample}
    )


@app.command(rich_help_panel=STEPS)
def sensitivity(
    model: ModelArg,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="File to write; NAME.sensitivity.npz otherwise.")
    ] = None,
    tokens: TokensOpt = None,
    work_dir: WorkDirOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure how much the model minds an error in each layer, on text that it wrote itself."""
    output = start(as_json, work_dir, long=True)
    from .. import steps

    path, made = steps.write_sensitivity(model, out, output, tokens)
    output.close()
    output.line(f"{path}: {len(made.trace)} layers on {made.tokens} tokens ({made.how})")
    output.line(f"Next: mint-mlx allocate PROFILE --sensitivity {shlex.quote(str(path))} --budget 4.5bpw -o plan.yaml")
    output.result({"sensitivity": str(path), "layers": len(made.trace), "tokens": made.tokens, "how": made.how})


@app.command(rich_help_panel=STEPS)
def allocate(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", help="What `mint-mlx profile` wrote, or a checkpoint that keeps one.")
    ],
    budget: Annotated[str, typer.Option(metavar="SIZE", help="19GB, 17.5GiB, 4.5bpw, smallest, ...")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="PLAN", help="File to write; stdout otherwise.")
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(metavar="FILE|ORG/NAME", help="What `mint-mlx sensitivity` wrote, or a checkpoint keeps."),
    ] = None,
    recipe: RecipeOpt = None,
    objective: ObjectiveOpt = None,
    override: OverrideOpt = None,
    ignore_guards: GuardsOpt = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plan.")] = False,
    emit: Annotated[
        str | None, typer.Option(metavar="mlx", help="`mlx` prints the quantization block of a config.json.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Choose bits and group size of every layer for a budget: writes a plan that you can edit."""
    output = start(as_json)
    import json

    from .. import efforts, steps
    from ..objectives import NEEDS_SENSITIVITY
    from ..plan import plan_text
    from ..units import both

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
            f"{out}: {both(total)}, {bits:.2f} bits per weight, within {plan.gap:.3%} of the best possible{expected}"
        )
        weighed = sensitivity or (profile if plan.objective in NEEDS_SENSITIVITY else None)  # kept beside the profile
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


@app.command(rich_help_panel=STEPS)
def sweep(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", help="What `mint-mlx profile` wrote, or a checkpoint that keeps one.")
    ],
    sensitivity: Annotated[
        str | None,
        typer.Option(metavar="FILE|ORG/NAME", help="What `mint-mlx sensitivity` wrote: losses become predicted KLs."),
    ] = None,
    measured: Annotated[
        list[str] | None, typer.Option(metavar="SIZE:PPL", help="A perplexity that was measured; repeatable.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show predicted quality against size, with the knee and the Macs that each size fits."""
    output = start(as_json)
    from ..files import check_picture
    from ..sweep import draw, sweep, sweep_rows

    if plot is not None:
        check_picture(plot)
    found = sweep(profile, sensitivity, tuple(measured or ()))
    output.table(*sweep_rows(found))
    if found.macs:
        output.line("Mac: the GPU's limit by default less 1 GiB, without a cache; `convert --fit` counts that too.")
    if plot is not None:
        draw(found, plot)
        output.line(f"{plot}: drawn")
    output.result(asdict(found))


@app.command(rich_help_panel=STEPS)
def refine(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Any MLX checkpoint: a folder or org/name.")],
    source: Annotated[str, typer.Option(metavar="MODEL", help="The unquantized model that it was made from.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to write; NAME-refined otherwise.")] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Steps of at most 1,024 tokens; 200 otherwise.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")] = False,
    work_dir: WorkDirOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Distil a checkpoint's scales and biases on text that its source wrote: same bytes, closer to it."""
    output = start(as_json, work_dir, long=True)
    from ..steps import refine_checkpoint

    path, found = refine_checkpoint(checkpoint, source, out, steps, force, output)
    output.close()
    output.line(f"{path}: KL from the source on held-out text {found.before:.4g} -> {found.after:.4g} nats a token")
    output.result({"path": str(path), "kl_before": found.before, "kl_after": found.after})
    output.line(f"mlx_lm.chat --model {shlex.quote(str(path))}")
