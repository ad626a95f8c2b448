"""`mint-mlx compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import MintError, UsageError
from .options import (
    BatchOpt,
    JsonOpt,
    LengthOpt,
    ProtocolOpt,
    SeedOpt,
    TextOpt,
    WindowsOpt,
    start,
)

if TYPE_CHECKING:
    from ..eval.compare import Comparison
    from ..eval.settings import Settings
    from ..eval.suite import Entry
    from .output import Output


def compare(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The unquantized source.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(metavar="SIZE", help="A size to compare at; repeatable.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="M1,M2,...", help="Methods; all that can run otherwise.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="REPO", help="Rank this MLX checkpoint too; repeatable."),
    ] = None,
    baseline_text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Text that calibrated peers may see; never the one that is scored."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="DIR", help="Where results go; NAME-compare otherwise."
        ),
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Several comparisons from a YAML file.")
    ] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Don't measure generation.")] = False,
    page: Annotated[
        bool, typer.Option("--report", help="Write report.html beside the results too.")
    ] = False,
    protocol: ProtocolOpt = "windows",
    length: LengthOpt = None,
    windows: WindowsOpt = None,
    seed: SeedOpt = None,
    batch: BatchOpt = None,
    text: TextOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Compare ways to quantize a model at the same bytes: ours, mlx-lm's and given checkpoints.

    Writes a ranked table, results.json and a picture (docs/guides/evaluate-and-compare.md).
    """
    output = start(as_json, long=True)
    if (model is None) == (suite is None):
        raise UsageError("give a model, or several with --suite FILE")
    if suite is not None and (budget or methods or given):
        raise UsageError(
            "a suite brings its own sizes and methods: leave --budget, --methods and --with out"
        )
    from ..base.errors import explain
    from ..base.units import parse_budget
    from ..eval.methods import check_methods
    from ..eval.settings import Settings
    from ..eval.suite import Entry, read_suite

    # All comparisons are checked before the first one starts.
    settings = Settings(protocol, length, windows, seed, batch, text)
    if suite is not None:
        entries = read_suite(suite)
    else:
        names = tuple(methods.split(",")) if methods is not None else None
        single = {"model": model, "budgets": budget or [], "with": given or [], "methods": names}
        entries = [Entry.model_validate(single)]
    scored = [_scored(entry, settings) for entry in entries]
    for entry in entries:
        check_methods(entry.methods, entry.baseline_text or baseline_text)
        for size in entry.budgets:
            parse_budget(size)
    folders = _folders(entries, out, suite is not None, page)

    # Of a suite, one that fails leaves the others their results.
    results = []
    failed = False
    for entry, chosen, folder in zip(entries, scored, folders, strict=True):
        try:
            comparison = _compare(output, entry, baseline_text, chosen, not no_speed)
            results.append(_save(output, comparison, folder, page))
        except Exception as error:
            if suite is None or explain(error) is None:
                raise
            failed = True
            output.note(f"{entry.model} could not be compared: {explain(error)}")
    output.result({"comparisons": results} if suite else results[0])
    if failed:
        raise typer.Exit(1)


def _folders(entries: Sequence[Entry], out: Path | None, suite: bool, page: bool) -> list[Path]:
    """Where each comparison's results go.

    Raises:
        MintError: a file is in the way, or one that isn't ours would be replaced.
    """
    from ..base.targets import check_page_folder, check_report_folder

    names = [Path(entry.model).name for entry in entries]
    folders = []
    for number, name in enumerate(names):
        folder = Path(f"{name}-compare") if out is None else out
        if suite:
            twice = names.count(name) > 1
            folder = (out or Path("compare")) / (f"{name}-{number + 1}" if twice else name)
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise MintError(f"{place} is a file: give a folder with -o")
        check_report_folder(folder)
        if page and folder.is_dir():
            check_page_folder(folder)
        folders.append(folder)
    return folders


def _scored(entry: Entry, settings: Settings) -> Settings:
    """What an entry is scored on: its text and windows, the command line's where it has none."""
    from dataclasses import replace

    return replace(
        settings,
        text=entry.text or settings.text,
        windows=entry.windows or settings.windows,
        length=entry.length or settings.length,
    )


def _compare(
    output: Output,
    entry: Entry,
    baseline_text: str | None,
    settings: Settings,
    speed: bool,
) -> Comparison:
    """One comparison."""
    from ..eval.compare import compare

    return compare(
        entry.model,
        entry.budgets,
        entry.methods,
        entry.given,
        entry.baseline_text or baseline_text,
        settings,
        speed=speed,
        report=output,
    )


def _save(output: Output, comparison: Comparison, folder: Path, page: bool) -> dict[str, Any]:
    """A comparison's files in a folder, its tables, and the same as a JSON object."""
    import shlex

    from ..eval import report
    from ..eval.compare_page import compare_page
    from ..eval.page import write_page

    command = shlex.join(["mint-mlx", *sys.argv[1:]])
    paths = report.save(comparison, folder, command)
    if page:
        paths.append(write_page(compare_page(comparison, command), folder)[0])
    output.close()

    for title, table in report.tables(comparison):
        output.table(report.columns(comparison), table, f"{comparison.source} {title}")
    for reason in report.reasons(comparison):
        output.line(f"not run: {reason}")
    output.line("written: " + ", ".join(map(str, paths)))

    # Figures of single windows are in results.json alone.
    rows = [
        {key: value for key, value in row.items() if not key.startswith("window_")}
        for row in comparison.rows
    ]
    return {
        "source": comparison.source,
        "noise_floor": comparison.noise_floor,
        "folder": str(folder),
        "rows": rows,
    }
