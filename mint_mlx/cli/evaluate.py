"""`mint-mlx eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.distributed import ranks
from ..base.interruption import EXIT_CODE, keeping_results
from .options import (
    BatchOpt,
    JsonOpt,
    LengthOpt,
    ModelArg,
    ProtocolOpt,
    SeedOpt,
    TextOpt,
    WindowsOpt,
    start,
)


def evaluate(
    model: ModelArg,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="What it was made from, or a --save-reference file: adds divergences.",
        ),
    ] = None,
    protocol: ProtocolOpt = "windows",
    length: LengthOpt = None,
    windows: WindowsOpt = None,
    seed: SeedOpt = None,
    batch: BatchOpt = None,
    text: TextOpt = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Score the source's own replies to bundled prompts.")
    ] = False,
    kinds: Annotated[
        bool,
        typer.Option(
            "--kinds", help="Score its replies to bundled tasks, and tell the KL of each kind."
        ),
    ] = False,
    save_reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep the source's predictions in a portable .safetensors file."
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the figures into the checkpoint's model card.")
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Write report.html and pictures into the checkpoint's folder."
        ),
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Score a model: perplexity on WikiText-2, and its divergence from its source.

    All figures have error bars (docs/guides/evaluate-and-compare.md).
    """
    output = start(as_json, long=True, shared=True)
    from ..eval.card import find_card, write_card
    from ..eval.evaluate import evaluate
    from ..eval.kinds import kind_table
    from ..eval.settings import Settings

    settings = Settings(protocol, length, windows, seed, batch, text, chat, kinds)
    if card:
        find_card(model)
    if report:
        _check_report(model, source)
    with keeping_results():
        figures = evaluate(model, settings, source, save_reference, output, with_spread=report)
    output.close()
    for line in _lines(figures):
        output.line(line)
    if "kinds" in figures:
        output.table(*kind_table(figures["kinds"]))
    hidden = ("window_nll", "window_kl", "spread")
    output.result({key: value for key, value in figures.items() if key not in hidden})
    if card and not figures["interrupted"]:
        output.line(f"{write_card(model, figures)}: written")
    if report and not figures["interrupted"] and ranks().first:
        from ..eval.make_report import report_figures
        from .report import tell_report

        tell_report(report_figures(Path(model).expanduser(), figures, str(source)), output)
    if figures["interrupted"]:
        output.note("interrupted: these are the figures of the windows that were finished")
        sys.exit(EXIT_CODE)


def _check_report(model: str, source: str | None) -> None:
    """Refuse --report where there is nothing to show, or no folder to write into (a MintError)."""
    from ..base.errors import UsageError
    from ..eval.make_report import check_report

    if source is None:
        raise UsageError("--report shows divergences from the source: give it with --source")
    check_report(model)


def _lines(f: dict[str, Any]) -> list[str]:
    """The figures for people."""
    from ..base.units import both, duration
    from ..eval.card import windows_text

    lines = [
        f"{f['model']}: {both(f['bytes'])}, {f['bits_per_weight']:.2f} bits per weight",
        f"text          {f['text']}, {windows_text(f)} ({f['protocol']}), "
        f"{f['tokens']:,} tokens scored",
        f"perplexity    {_with_error(f['perplexity'], f['perplexity_se'])}",
        f"  per window  median {f['median_perplexity']:.5g}, 10%-trimmed mean "
        f"{f['trimmed_perplexity']:.5g}, {f['outliers']} above 100",
    ]
    if "kl" in f:
        lines += _divergence_lines(f)
    if f.get("router_changes") is not None:
        lines.append(
            f"experts       other ones chosen in {f['router_changes']:.2%} of (token, layer) "
            f"pairs; KL where the least-used tenth works {_number(f['kl_rare_experts'])}"
        )
    if "kl_control_tokens" in f:
        lines.append(
            f"control       KL {f['kl_control_tokens']:.4g} at {f['control_tokens']} control tokens"
        )

    # What the figures cost comes last.
    streamed = ", streamed block by block" if f["streamed"] else ""
    lines.append(
        f"took          {duration(f['seconds'])}, {f['tokens_per_second']:.0f} tokens/s on "
        f"{_device(f['device'])}, {both(f['peak_memory'])} at the peak{streamed}"
    )
    return lines


def _divergence_lines(f: dict[str, Any]) -> list[str]:
    """The figures that hold a model against its source."""
    divergence = _with_error(f["kl"], f["kl_se"])
    lines = [
        f"KL from {f['source']}: {divergence} nats per token, noise floor "
        f"{_floor(f['noise_floor'])}",
        f"  per token   median {f['kl_median']:.4g}, 90 % {f['kl_p90']:.4g}, 99 % "
        f"{f['kl_p99']:.4g}, 99.9 % {f['kl_p999']:.4g}, max {f['kl_max']:.4g}",
    ]

    # Merging is told of where it shows.
    if abs(f["kl_merging_error"] or 0) > (f["noise_floor"] or 0):
        lines.append(
            "  merging     rare tokens count as one, which lowers it by "
            f"{f['kl_merging_error']:.1g} (measured)"
        )
    ci = f["ln_ppl_difference_ci95"]
    interval = f" (95 %: {ci[0]:+.5f} to {ci[1]:+.5f})" if ci else ""
    return [
        *lines,
        f"ln PPL        {f['ln_ppl_difference']:+.5f} against the source{interval}",
        f"same top 1    {f['same_top1']:.2%}, "
        f"root mean square change of the true token's probability {f['rms_dp']:.4f}",
    ]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5g}" + (f" ± {error:.2g}" if error is not None else "")


def _floor(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _device(name: str) -> str:
    from ..base.blas import ADVICE

    if name == "gpu":
        return "the GPU"
    kind = name.removeprefix("cpu-")
    if kind == "reference":
        return f"the CPU with MLX's reference BLAS ({ADVICE})"
    return f"the CPU in float32 with {kind}"
