"""The commands that make checkpoints: `convert` and its steps. Each parses, calls one function and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MintError, UsageError
from . import (
    EVERYDAY,
    STEPS,
    BudgetOpt,
    GuardsOpt,
    JsonOpt,
    ModelArg,
    ObjectiveOpt,
    OverrideOpt,
    RecipeOpt,
    app,
    start,
)

if TYPE_CHECKING:
    from ..output import Output


@app.command(rich_help_panel=EVERYDAY)
def convert(
    model: ModelArg,
    budget: BudgetOpt = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write; NAME-mint-4.5bpw otherwise.")
    ] = None,
    recipe: RecipeOpt = None,
    objective: ObjectiveOpt = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Carry out this plan as it is.")] = None,
    uniform: Annotated[
        str | None, typer.Option(metavar="CONFIG", help="The same for every layer, e.g. 4bit-g64.")
    ] = None,
    override: OverrideOpt = None,
    quantizer: Annotated[str | None, typer.Option(metavar="NAME", help="How codes are made: rtn.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written; read headers only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")] = False,
    ignore_guards: GuardsOpt = False,
    no_smoke: Annotated[
        bool, typer.Option("--no-smoke", help="Don't let the result write a sentence at the end.")
    ] = False,
    upload_repo: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Upload the result, privately.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --upload-repo: make the repository public.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Fit a model into a budget: profile, allocate, write, verify.

    Without a budget it lists the possible sizes.
    """
    output = start(as_json)
    from .. import hub, overview, pipeline

    if public and not upload_repo:
        raise UsageError("--public says how --upload-repo uploads: give that too")
    if upload_repo and hub.parse_repo(upload_repo) is None:
        raise UsageError(f"{upload_repo!r} is not a repository name: write org/name")
    if budget is None and plan is None and uniform is None:
        job = pipeline.prepare(model, recipe, weights=False)
        pipeline.refuse_quantized(job)
        _print_sizes(output, job, overview.size_table(job))
        raise typer.Exit(2)
    if dry_run:
        _dry_run(output, model, budget, recipe, objective, plan, uniform, override or [], ignore_guards)
        return
    result = pipeline.convert(
        model,
        budget,
        out,
        plan=plan,
        uniform_config=uniform,
        recipe=recipe,
        objective=objective,
        quantizer=quantizer,
        overrides=override or [],
        ignore_guards=ignore_guards,
        force=force,
        smoke=not no_smoke,
        report=output,
    )
    output.close()
    data = pipeline.summary(result)
    output.table(*overview.config_rows(result.plan, result.inventory))
    if budget == "smallest":
        output.note("this is the least that the safety floor allows: safe from collapse, but clearly worse than 4 bits")
    output.line(pipeline.describe(result))
    if result.sentence:
        output.line(f"it writes: {result.sentence}")
    if upload_repo:
        output.stage("upload")
        data["uploaded"] = hub.upload(result.path, upload_repo, private=not public)
        output.line(f"uploaded to {data['uploaded']}")
    output.result(data)
    output.line(f"mlx_lm.chat --model {result.path}")


def _print_sizes(output: Output, job: Any, table: list[Any]) -> None:
    from dataclasses import asdict

    from .. import overview
    from ..units import both, count

    output.line(
        f"{job.source.name}: {count(job.inventory.parameters)} parameters, {both(job.source.weight_bytes)} of weights"
    )
    output.table(*overview.size_rows(table))
    output.line(
        "Choose the largest that your Mac fits beside its other programs: 4.5bpw is the usual choice, below 4 quality "
        "falls fast, above 6 little is left to gain."
    )
    if table[0].loss is None:
        output.line("No weight has been read: sizes are exact, the smallest assumes a usual safety floor.")
    output.line(f"Then: mint-mlx convert {job.source.name if '/' in job.source.name else 'MODEL'} --budget 4.5bpw")
    output.result(
        {"source": job.source.name, "parameters": job.inventory.parameters, "sizes": [asdict(r) for r in table]}
    )


def _dry_run(
    output: Output,
    model: str,
    budget: str | None,
    recipe: str | None,
    objective: str | None,
    plan_file: Path | None,
    uniform: str | None,
    overrides: list[str],
    ignore_guards: bool,
) -> None:
    from dataclasses import asdict

    from .. import allocate, overview, pipeline
    from ..plan import check_plan, read_plan
    from ..quant import parse_config
    from ..units import parse_budget

    if sum(x is not None for x in (budget, plan_file, uniform)) != 1:
        raise UsageError("give exactly one of --budget, --plan and --uniform")
    parsed = [allocate.parse_override(text) for text in overrides]
    job = pipeline.prepare(model, recipe, weights=False)
    pipeline.refuse_quantized(job)
    known = overview.known_profile(job) if budget is not None else None
    if plan_file is not None:
        plan = read_plan(plan_file)
        check_plan(plan, job.inventory, ignore_guards)
    elif uniform is not None:
        plan = allocate.uniform(job.source, job.inventory, parse_config(uniform), parsed, ignore_guards)
    else:
        assert budget is not None
        curves = known or overview.assumed_profile(job)
        plan = allocate.allocate(curves, parse_budget(budget), job.recipe, objective, parsed, ignore_guards)
    run = overview.dry_run(job, plan, known is not None, budget is not None)
    for line in overview.dry_lines(job, plan, run):
        output.line(line)
    output.table(*overview.config_rows(plan, job.inventory))
    output.result(asdict(run) | {"active_bytes": job.inventory.active_bytes(plan.choice)})


@app.command(rich_help_panel=EVERYDAY)
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|PROFILE|PLAN", help="A model, a profile (.json) or a plan (.yaml).")
    ],
    as_json: JsonOpt = False,
) -> None:
    """Show every layer with its role, configuration, bytes and error."""
    output = start(as_json)
    from .. import inspection

    inspection.show(target, output)


@app.command(rich_help_panel=EVERYDAY)
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this recipe with its reasons.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """List the recipes, or print one."""
    output = start(as_json)
    from ..recipes import bundled, find_recipe, read_recipe

    if name is None:
        found = [read_recipe(path) for path in bundled().values()]
        output.table(
            ["recipe", "serves", "about"], [[r.name, ", ".join(r.serves) or "every other", r.about] for r in found]
        )
        output.result({"recipes": [r.model_dump() for r in found]})
        return
    recipe = find_recipe(name, {})
    path = bundled().get(name)
    output.line((path or Path(name)).read_text(encoding="utf-8").rstrip())
    output.result(recipe.model_dump())


@app.command(rich_help_panel=EVERYDAY)
def demo(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the result in this folder.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Run the whole job on a small, really trained Mixture-of-Experts model that comes with the program."""
    output = start(as_json)
    from ..demo import run

    run(output, out)


@app.command(rich_help_panel=STEPS)
def profile(
    model: ModelArg,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="PROFILE", help="File to write; NAME.profile.json otherwise.")
    ] = None,
    recipe: RecipeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure the error of every layer at every candidate; one profile serves every budget."""
    output = start(as_json)
    from .. import pipeline
    from ..profile import load_profile, save_profile

    job = pipeline.prepare(model, recipe)
    pipeline.refuse_quantized(job)
    path = out or Path(f"{job.source.name.rpartition('/')[2]}.profile.json")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise MintError(f"{path} cannot be written: give a file in an existing folder with -o")
    if path.is_file() and load_profile(path).fingerprint != job.source.fingerprint:
        output.note(f"{path} is stale: {job.source.name} has changed since; it is measured anew")
    made = pipeline.get_profile(job, output)
    save_profile(made, path)
    output.close()
    output.line(f"{path}: {len(made.curves)} layers. Next: mint-mlx allocate {path} --budget 4.5bpw -o plan.yaml")
    output.result({"profile": str(path), "layers": len(made.curves), "fingerprint": made.fingerprint})


@app.command(rich_help_panel=STEPS)
def allocate(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A file that `mint-mlx profile` wrote.")],
    budget: Annotated[str, typer.Option(metavar="SIZE", help="19GB, 17.5GiB, 4.5bpw, smallest, ...")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="PLAN", help="File to write; stdout otherwise.")
    ] = None,
    recipe: RecipeOpt = None,
    objective: ObjectiveOpt = None,
    override: OverrideOpt = None,
    ignore_guards: GuardsOpt = False,
    emit: Annotated[
        str | None, typer.Option(metavar="mlx", help="`mlx` prints the quantization block of a config.json.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Choose bits and group size of every layer for a budget: writes a plan that you can edit."""
    output = start(as_json)
    import json

    from .. import allocate as allocation
    from ..plan import plan_text, write_plan
    from ..profile import load_profile
    from ..recipes import find_recipe
    from ..units import both, parse_budget

    if emit not in (None, "mlx"):
        raise UsageError(f"--emit {emit} is unknown: there is only `--emit mlx`")
    size = parse_budget(budget)
    overrides = [allocation.parse_override(text) for text in override or []]
    curves = load_profile(profile)
    plan = allocation.allocate(
        curves, size, find_recipe(recipe or curves.recipe, {}), objective, overrides, ignore_guards
    )
    total = plan.layout(curves.inventory).total
    if out is not None:
        write_plan(plan, curves.inventory, out)
    if emit == "mlx":
        print(json.dumps(plan.quantization(), indent=4))
        return
    if out is None:
        output.line(plan_text(plan, curves.inventory).rstrip())
    else:
        bits = total * 8 / curves.inventory.parameters
        output.line(
            f"{out}: {both(total)}, {bits:.2f} bits per weight, at most {plan.gap or 0:.3%} from the best possible"
        )
        output.line(f"Next: mint-mlx convert MODEL --plan {out}")
    output.result(
        {
            "bytes": total,
            "budget_bytes": plan.budget_bytes,
            "objective": plan.objective,
            "loss": plan.loss,
            "gap": plan.gap,
            "plan": str(out) if out else None,
            "layers": {path: str(config) for path, config in plan.choice.items()},
        }
    )
