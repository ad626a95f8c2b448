"""`mint-mlx report`, and `--report` of the commands that write or score a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import JsonOpt, TextOpt, WindowsOpt, start

if TYPE_CHECKING:
    from .output import Output


def report(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="The folder of a quantized model.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="What it was made from: measures what is missing. Else what is known is shown.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Folder for it; the checkpoint's own."),
    ] = None,
    windows: WindowsOpt = None,
    text: TextOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a page about a checkpoint: its plan, loss, size, tokens of largest error, Macs.

    One report.html that opens from disk, and pictures that its model card shows
    (docs/guides/evaluate-and-compare.md).
    """
    output = start(as_json, long=True)
    from ..base.errors import UsageError
    from ..eval.make_report import make_report
    from ..eval.settings import Settings

    settings = Settings(windows=windows, text=text)
    if source is None and settings != Settings():
        raise UsageError("--windows and --text say what is scored: give the source with --source")
    paths = make_report(checkpoint, source, settings, out, output)
    output.close()
    tell_report(paths, output)
    output.result({"page": str(paths[0]), "pictures": [str(path) for path in paths[1:]]})


def tell_report(paths: list[Path], output: Output) -> None:
    """Say where a report is."""
    output.line(f"{paths[0]}: written, with {len(paths) - 1} pictures beside it")
