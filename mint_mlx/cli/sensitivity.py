"""`mint-mlx sensitivity`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    JsonOpt,
    KeepTwinOpt,
    ModelArg,
    NoTwinOpt,
    TokensOpt,
    TwinOpt,
    WorkDirOpt,
    start,
)


def sensitivity(
    model: ModelArg,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="File to write; NAME.sensitivity.npz otherwise."
        ),
    ] = None,
    tokens: TokensOpt = None,
    twin: TwinOpt = None,
    keep_twin: KeepTwinOpt = None,
    no_twin: NoTwinOpt = False,
    work_dir: WorkDirOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure how sensitive the model is to an error in each layer, on text that it writes itself.

    One sensitivity serves every budget (docs/guides/reuse-measurements.md).
    """
    output = start(as_json, work_dir, long=True)
    from ..jobs import steps

    path, measured = steps.write_sensitivity(
        model, out, output, tokens, twin=twin, keep_twin=keep_twin, no_twin=no_twin
    )
    output.close()
    layers = len(measured.trace)
    count = int(measured.tokens.size)
    part = "" if measured.measured == count else f"{measured.measured} of "
    output.line(f"{path}: {layers} layers on {part}{count} tokens ({measured.text.how})")
    output.line(
        f"Next: mint-mlx allocate PROFILE --sensitivity {shlex.quote(str(path))} --budget 4.5bpw "
        "-o plan.yaml"
    )
    output.result(
        {
            "sensitivity": str(path),
            "layers": layers,
            "tokens": count,
            "measured": measured.measured,
            "how": measured.text.how,
        }
    )
