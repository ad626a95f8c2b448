"""`mint-mlx convert`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.distributed import ranks
from ..base.errors import UsageError
from ..converters.quantizers.registry import QUANTIZERS
from .options import (
    BudgetOpt,
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
    named,
    start,
)

if TYPE_CHECKING:
    from ..jobs.model import Job
    from .output import Output
    from .tables import SizeRow


LARGE = 10**9  # parameters from which on the time is said before the work


def convert(
    model: ModelArg,
    budget: BudgetOpt = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder to write; NAME-mint-4.5bpw otherwise."),
    ] = None,
    parts: PartsOpt = None,
    recipe: RecipeOpt = None,
    objective: ObjectiveOpt = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="this-mac|32GiB", help="The size that such a Mac runs, in place of --budget."
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="Context that must fit beside the weights.")
    ] = 8192,
    kv_bits: Annotated[
        int | None,
        typer.Option("--kv-bits", metavar="BITS", help="Bits of the cache, as mlx-lm's --kv-bits."),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            metavar="fast|balanced|best",
            help="What to look at and how to round; balanced otherwise.",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ORG/NAME",
            help="Carry out this plan, or the one that a checkpoint keeps, as it is.",
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ORG/NAME", help="Take a sensitivity from here instead of measuring it."
        ),
    ] = None,
    tokens: TokensOpt = None,
    uniform: Annotated[
        str | None, typer.Option(metavar="CONFIG", help="The same for every layer, e.g. 4bit-g64.")
    ] = None,
    override: OverrideOpt = None,
    quantizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"How codes are made: {named(QUANTIZERS.values())}."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written; read headers only.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output folder.")
    ] = False,
    ignore_guards: GuardsOpt = False,
    sample: SampleOpt = None,
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Take NaN and infinite weights as they are (--effort fast only).",
        ),
    ] = False,
    low_disk: Annotated[
        bool,
        typer.Option(
            "--low-disk",
            help=(
                "Of a Hub model, have one or two shards on disk at a time (--effort fast, or a "
                "plan with rtn)."
            ),
        ),
    ] = False,
    no_smoke: Annotated[
        bool, typer.Option("--no-smoke", help="Don't let the result write a sentence at the end.")
    ] = False,
    work_dir: WorkDirOpt = None,
    upload_repo: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload the result, privately.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --upload-repo: make the repository public.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Fit a model into a budget: profile, allocate, write, verify.

    Without a budget it lists the possible sizes.
    """
    output = start(as_json, work_dir, long=True, shared=True)
    from ..checkpoint import hub
    from ..jobs import convert as convert_job
    from ..jobs import dry_run as forecast
    from ..jobs.request import Request, place_order
    from . import tables

    if public and not upload_repo:
        raise UsageError("--public says how --upload-repo uploads: give that too")
    if upload_repo and hub.parse_repo(upload_repo) is None:
        raise UsageError(f"{upload_repo!r} is not a repository name: write org/name")
    request = Request(
        model,
        budget=budget,
        fit=fit,
        context=context,
        kv_bits=kv_bits,
        plan=plan,
        uniform=uniform,
        out=out,
        parts=parts,
        recipe=recipe,
        objective=objective,
        effort=effort,
        quantizer=quantizer,
        sensitivity=sensitivity,
        tokens=tokens,
        overrides=override or [],
        ignore_guards=ignore_guards,
        force=force,
        sample=sample,
        allow_nonfinite=allow_nonfinite,
        low_disk=low_disk,
        called=upload_repo,
    )
    if budget is None and fit is None and plan is None and uniform is None:
        more = {"--parts": parts, "--recipe": recipe, "--objective": objective, "--effort": effort}
        words = [model, *(word for name, value in more.items() if value for word in (name, value))]
        _print_sizes(output, *tables.size_table(request), context, shlex.join(words))
        raise typer.Exit(2)
    order = place_order(request, output)
    if order.fit is not None:
        output.table(*tables.fit_rows(order.fit))
        if hint := tables.raise_hint(order):
            output.note(hint)
    if dry_run:
        chosen, run = forecast.dry_run(order)
        for line in forecast.dry_lines(order.job, chosen, run):
            output.line(line)
        output.table(*tables.config_rows(chosen, order.job.inventory))
        output.result(asdict(run))
        return
    if upload_repo and ranks().first:
        hub.check_upload(upload_repo, private=not public)
    if order.job.inventory.parameters > LARGE:
        output.note(forecast.time_note(order))
    result = convert_job.carry_out(order, smoke=not no_smoke, report=output)
    output.close()
    data = convert_job.summary(result)
    output.table(*tables.config_rows(result.plan, result.inventory))
    if budget == "smallest" and result.bits_per_weight < 4:
        output.note(
            "this is the least that the safety floor allows: safe from collapse, but clearly "
            "worse than 4 bits"
        )
    output.line(convert_job.describe(result))
    if result.sentence:
        output.line(f"it writes: {result.sentence}")
    if upload_repo and ranks().first:
        output.stage("upload")
        try:
            data["uploaded"] = hub.upload(result.path, upload_repo, private=not public)
        except Exception:
            output.note(
                f"{result.path} is complete; upload it with: hf upload {upload_repo} "
                f"{shlex.quote(str(result.path))}"
            )
            raise
        output.line(f"uploaded to {data['uploaded']}")
    output.result(data)
    if kv_bits is None:
        output.line(f"mlx_lm.chat --model {shlex.quote(str(result.path))}")
        return
    output.note(
        "of mlx-lm's commands only generate has a quantized cache: chat and server keep 16 bits"
    )
    cache = f"--kv-bits {kv_bits} --quantized-kv-start 0"
    output.line(f"mlx_lm.generate --model {shlex.quote(str(result.path))} {cache} --prompt Hello")


def _print_sizes(output: Output, job: Job, table: list[SizeRow], context: int, words: str) -> None:
    from ..base.units import both, count
    from . import tables

    output.line(
        f"{job.source.name}: {count(job.inventory.parameters)} parameters, "
        f"{both(job.source.weight_bytes)}"
    )
    output.table(*tables.size_rows(table))
    output.line(
        f"Mac: the smallest that has room for it beside a context of {context} tokens (--context); "
        "`--fit this-mac` takes the largest size that this one runs. 4.5bpw is the usual choice "
        "where there is one: below 4 quality falls fast, above 6 little is left to gain."
    )
    if table[0].loss is None:
        output.line(
            "No weight has been read: sizes are exact, but for the smallest, a guess that may be "
            "a third too low."
        )
    if any(row.expected_kl is not None for row in table):
        output.line(
            "Expected KL: divergence from the source in nats a token, as this model's sensitivity "
            "predicts it."
        )
    usual = "4.5bpw" if "4.5bpw" in [row.label for row in table] else table[0].label
    output.line(f"Then: mint-mlx convert {words} --budget {usual}")
    sizes = [asdict(row) for row in table]
    output.result(
        {"source": job.source.name, "parameters": job.inventory.parameters, "sizes": sizes}
    )
