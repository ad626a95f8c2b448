"""`mint-mlx convert`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..base.distributed import ranks
from ..converters.quantizers.registry import QUANTIZERS
from .check import tell_check
from .convert_report import (
    print_dry_run,
    print_fit,
    print_mac_speeds,
    print_next,
    print_result,
    print_sizes,
    write_page,
)
from .options import (
    BudgetOpt,
    GuardsOpt,
    JsonOpt,
    KeepTwinOpt,
    MinSpeedOpt,
    ModelArg,
    NoTwinOpt,
    ObjectiveOpt,
    OverrideOpt,
    PartsOpt,
    RecipeOpt,
    SampleOpt,
    SpeedOpt,
    SpeedTableOpt,
    TokensOpt,
    TwinOpt,
    WorkDirOpt,
    named,
    start,
)

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
            metavar="this-mac|32GiB|32",
            help="The largest size that such a Mac runs, in place of --budget.",
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
            help="How much time to spend on quality; balanced otherwise.",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ORG/NAME",
            help="Carry out this plan, or the one in a checkpoint, as it is.",
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ORG/NAME",
            help="Use this sensitivity, or the one in a checkpoint, instead of measuring it.",
        ),
    ] = None,
    tokens: TokensOpt = None,
    twin: TwinOpt = None,
    keep_twin: KeepTwinOpt = None,
    no_twin: NoTwinOpt = False,
    min_speed: MinSpeedOpt = None,
    speed: SpeedOpt = None,
    speed_table: SpeedTableOpt = None,
    uniform: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="The same for every layer, e.g. 4bit-g64 (keep: as stored)."
        ),
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
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float16|bfloat16",
            help="Type of all 16-bit tensors; the model's own otherwise (M1, M2: float16).",
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "-d", "--dequantize", help="In place of a size: 16 bits, however it is stored."
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
    keep_nvfp4: Annotated[
        bool,
        typer.Option(
            "--keep-nvfp4", help="Leave experts of NVFP4 packed; MLX runs these on a GPU only."
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Without a size: draw the curve of all sizes."),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Write report.html and pictures into the result, unmeasured."
        ),
    ] = False,
    no_smoke: Annotated[
        bool, typer.Option("--no-smoke", help="Don't let the result write a sentence at the end.")
    ] = False,
    work_dir: WorkDirOpt = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="The card's base_model for a folder; what its own card tells otherwise.",
        ),
    ] = None,
    no_measurements: Annotated[
        bool,
        typer.Option("--no-measurements", help="Leave profile and sensitivity out of the result."),
    ] = False,
    upload_repo: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload the result, privately.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --upload-repo: make the repository public.")
    ] = False,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="With --upload-repo: replace an earlier upload unasked."),
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Convert a model to the size that you want, in MLX format: measure, allocate, write, verify.

    Without a size it lists those that are possible (docs/guides/choose-a-size.md).
    """
    output = start(as_json, work_dir, long=True, shared=True)
    from ..jobs.request import Request, check_request
    from .upload import check_words, prepare_upload, upload_result

    # Words are refused before MLX is imported, which takes seconds.
    check_words(upload_repo, public, yes)
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
        card_name=upload_repo,
        keep_nvfp4=keep_nvfp4,
        dequantize=dequantize,
        dtype=dtype,
        base_model=base_model,
        measurements=not no_measurements,
        min_speed=min_speed,
        speed=speed,
        speed_table=speed_table,
        twin=twin,
        keep_twin=keep_twin,
        no_twin=no_twin,
    )
    has_size = bool(budget or fit or plan or uniform or dequantize)
    _check_pictures(has_size, plot, report, dry_run)
    if not has_size:
        print_sizes(check_request(replace(request, budget="smallest")), plot, output)
        raise typer.Exit(2)
    checked = check_request(request)

    # What headers alone can refuse or tell comes before any work.
    from ..jobs.convert import carry_out
    from ..jobs.order import place_order

    order = place_order(checked, output)
    print_fit(order, output)
    if dry_run:
        print_dry_run(order, output)
        return
    if upload_repo and ranks().first:
        prepare_upload(upload_repo, order.job.source.name, public, yes, output)
    if order.job.inventory.parameters > LARGE:
        from ..jobs.dry_run import time_note

        output.note(time_note(order))

    result = carry_out(order, smoke=not no_smoke, report=output)
    output.close()
    data = print_result(result, budget, output)
    if report and ranks().first:
        write_page(result, model, output)
    data |= print_mac_speeds(order, result.plan, output)
    if upload_repo and ranks().first:
        source = order.job.source.name
        data["uploaded"] = upload_result(result.path, upload_repo, source, public, output)
    output.result(data)
    tell_check(order, result, output)
    print_next(result, kv_bits, output)


def _check_pictures(has_size: bool, plot: Path | None, report: bool, dry_run: bool) -> None:
    """Refuse pictures where they can't be drawn (a MintError)."""
    from ..base.errors import UsageError
    from ..base.targets import check_picture

    if has_size and plot is not None:
        raise UsageError(
            "--plot draws the curve of all sizes: leave the size out, or give --report, which "
            "draws the result"
        )
    if plot is not None:
        check_picture(plot)
    if report and (dry_run or not has_size):
        raise UsageError("--report is of a result: give a size, without --dry-run")
