"""`mint-mlx sensitivity`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    JsonOpt,
    ModelArg,
    TokensOpt,
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
    work_dir: WorkDirOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure how much the model minds an error in each layer, on text that it wrote itself."""
    output = start(as_json, work_dir, long=True)
    from ..jobs import steps

    path, made = steps.write_sensitivity(model, out, output, tokens)
    output.close()
    output.line(f"{path}: {len(made.trace)} layers on {made.tokens} tokens ({made.how})")
    output.line(
        f"Next: mint-mlx allocate PROFILE --sensitivity {shlex.quote(str(path))} --budget 4.5bpw "
        "-o plan.yaml"
    )
    output.result(
        {
            "sensitivity": str(path),
            "layers": len(made.trace),
            "tokens": made.tokens,
            "how": made.how,
        }
    )
