"""The commands that measure: `eval` and `compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MintError, UsageError
from . import INTERRUPTED, PROOF, JsonOpt, ModelArg, app, start

if TYPE_CHECKING:
    from ..eval.evaluate import Settings
    from ..eval.suite import Entry
    from ..output import Output

TextOpt = Annotated[str | None, typer.Option("--text", metavar="FILE", help="UTF-8 text; WikiText-2 test otherwise.")]
ProtocolOpt = Annotated[str, typer.Option(metavar="NAME", help="windows, or llama.cpp (see the README).")]
LengthOpt = Annotated[
    int | None, typer.Option(metavar="L", help="Tokens a window; 2048 (llama.cpp: 512), at most its context.")
]
WindowsOpt = Annotated[
    int | None, typer.Option(metavar="N", help="Score the first N windows only; with --seed N at random.")
]
SeedOpt = Annotated[int | None, typer.Option(metavar="S", help="Choose --windows at random with this seed.")]
BatchOpt = Annotated[int | None, typer.Option(metavar="B", help="Windows at once; about 4,096 tokens otherwise.")]


@app.command("eval", rich_help_panel=PROOF)
def evaluate(
    model: ModelArg,
    source: Annotated[
        str | None,
        typer.Option(metavar="REF", help="What it was made from, or a --save-reference file: adds divergences."),
    ] = None,
    protocol: ProtocolOpt = "windows",
    length: LengthOpt = None,
    windows: WindowsOpt = None,
    seed: SeedOpt = None,
    batch: BatchOpt = None,
    text: TextOpt = None,
    chat: Annotated[bool, typer.Option("--chat", help="Score the source's own replies to bundled prompts.")] = False,
    save_reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the source's predictions in a portable .safetensors file.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Perplexity on WikiText-2, and the divergence from the source, with error bars."""
    output = start(as_json, long=True, shared=True)
    from ..eval.evaluate import Settings, evaluate

    settings = Settings(protocol, length, windows, seed, batch, text, chat)
    figures = evaluate(model, settings, source, save_reference, output)
    output.close()
    for line in _lines(figures):
        output.line(line)
    output.result({key: value for key, value in figures.items() if not key.startswith("window_")})
    if figures["interrupted"]:
        output.note("interrupted: these are the figures of the windows that were finished")
        sys.exit(INTERRUPTED)


@app.command(rich_help_panel=PROOF)
def compare(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="The unquantized source.")] = None,
    budget: Annotated[list[str] | None, typer.Option(metavar="SIZE", help="A size to compare at; repeatable.")] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="M1,M2,...", help="Methods; all that can run otherwise.")
    ] = None,
    given: Annotated[
        list[str] | None, typer.Option("--with", metavar="REPO", help="Rank this MLX checkpoint too; repeatable.")
    ] = None,
    baseline_text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text that calibrated peers may see; never the one that is scored."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Where results go; NAME-compare otherwise.")
    ] = None,
    suite: Annotated[Path | None, typer.Option(metavar="FILE", help="Several comparisons from a YAML file.")] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Don't measure generation.")] = False,
    protocol: ProtocolOpt = "windows",
    length: LengthOpt = None,
    windows: WindowsOpt = None,
    seed: SeedOpt = None,
    batch: BatchOpt = None,
    text: TextOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Our methods and mlx-lm's at the same bytes: a ranked table, results.json and a picture."""
    output = start(as_json, long=True)
    from ..errors import explain
    from ..eval.compare import check_methods
    from ..eval.evaluate import Settings
    from ..eval.suite import Entry, read_suite
    from ..units import parse_budget

    if (model is None) == (suite is None):
        raise UsageError("give a model, or several with --suite FILE")
    if suite is not None and (budget or methods or given):
        raise UsageError("a suite brings its own sizes and methods: leave --budget, --methods and --with out")
    settings = Settings(protocol, length, windows, seed, batch, text)
    if suite is not None:
        entries = read_suite(suite)
    else:
        names = tuple(methods.split(",")) if methods is not None else None
        single = {"model": model, "budgets": budget or [], "with": given or [], "methods": names}
        entries = [Entry.model_validate(single)]
    for entry in entries:
        check_methods(entry.methods, baseline_text)
        for size in entry.budgets:
            parse_budget(size)
    folders = []
    for number, entry in enumerate(entries):
        name = Path(entry.model).name
        twice = sum(Path(e.model).name == name for e in entries) > 1
        folder = Path(f"{name}-compare") if out is None else out
        if suite is not None:
            folder = (out or Path("compare")) / (f"{name}-{number + 1}" if twice else name)
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise MintError(f"{place} is a file: give a folder with -o")
        folders.append(folder)
    found, failed = [], False
    for entry, folder in zip(entries, folders, strict=True):
        try:
            found.append(_compare(output, entry, baseline_text, settings, not no_speed, folder))
        except Exception as error:
            if suite is None or explain(error) is None:
                raise
            failed = True
            output.note(f"{entry.model} could not be compared: {explain(error)}")
    output.result({"comparisons": found} if suite else found[0])
    if failed:
        raise typer.Exit(1)


def _compare(
    output: Output, entry: Entry, baseline_text: str | None, settings: Settings, speed: bool, folder: Path
) -> dict[str, Any]:
    import shlex

    from ..eval import results
    from ..eval.compare import compare

    found = compare(
        entry.model, entry.budgets, entry.methods, entry.given, baseline_text, settings, speed=speed, report=output
    )
    command = shlex.join(["mint-mlx", *sys.argv[1:]])
    paths = results.save(found, folder, command)
    output.close()
    for title, table in results.tables(found):
        output.table(results.columns(found), table, f"{found.source} {title}")
    for reason in results.reasons(found):
        output.line(f"not run: {reason}")
    output.line("written: " + ", ".join(map(str, paths)))
    rows = [{k: v for k, v in row.items() if not k.startswith("window_")} for row in found.rows]
    return {"source": found.source, "noise_floor": found.noise_floor, "folder": str(folder), "rows": rows}


def _lines(f: dict[str, Any]) -> list[str]:
    """The figures for people."""
    from ..units import both, duration

    def pm(value: float, se: float | None) -> str:
        return f"{value:.5g}" + (f" ± {se:.2g}" if se is not None else "")

    lines = [
        f"{f['model']}: {both(f['bytes'])}, {f['bits_per_weight']:.2f} bits per weight",
        f"text          {f['text']}, {f['windows']} windows of {f['length']} ({f['protocol']}), "
        f"{f['tokens']:,} tokens scored",
        f"perplexity    {pm(f['perplexity'], f['perplexity_se'])}",
        f"  per window  median {f['median_perplexity']:.5g}, 10%-trimmed mean {f['trimmed_perplexity']:.5g}, "
        f"{f['outliers']} above 100",
    ]
    if "kl" in f:
        ci = f["ln_ppl_difference_ci95"]
        interval = f" (95 %: {ci[0]:+.5f} to {ci[1]:+.5f})" if ci else ""
        lines += [
            f"KL from {f['source']}: {pm(f['kl'], f['kl_se'])} nats per token, noise floor {_floor(f['noise_floor'])}",
            f"  per token   median {f['kl_median']:.4g}, 90 % {f['kl_p90']:.4g}, 99 % {f['kl_p99']:.4g}, "
            f"99.9 % {f['kl_p999']:.4g}, max {f['kl_max']:.4g}",
            f"ln PPL        {f['ln_ppl_difference']:+.5f} against the source{interval}",
            f"same top 1    {f['same_top1']:.2%}, "
            f"root mean square change of the true token's probability {f['rms_dp']:.4f}",
        ]
        if abs(f["kl_merging_error"] or 0) > (f["noise_floor"] or 0):
            lines.insert(
                -2, f"  merging     rare tokens count as one, which lowers it by {f['kl_merging_error']:.1g} (measured)"
            )
    if f.get("router_changes") is not None:
        lines.append(
            f"experts       other ones chosen in {f['router_changes']:.2%} of (token, layer) pairs; KL where the "
            f"least-used tenth works {_number(f['kl_rare_experts'])}"
        )
    if "kl_control_tokens" in f:
        lines.append(f"control       KL {f['kl_control_tokens']:.4g} at {f['control_tokens']} control tokens")
    lines.append(
        f"took          {duration(f['seconds'])}, {f['tokens_per_second']:.0f} tokens/s on {_device(f['device'])}, "
        f"{both(f['peak_memory'])} at the peak" + (", streamed block by block" if f["streamed"] else "")
    )
    return lines


def _floor(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _device(name: str) -> str:
    from ..blas import ADVICE

    if name == "gpu":
        return "the GPU"
    kind = name.removeprefix("cpu-")
    if kind == "reference":
        return f"the CPU with MLX's reference BLAS ({ADVICE})"
    return f"the CPU in float32 with {kind}"
