"""`mint-mlx refine`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    JsonOpt,
    WorkDirOpt,
    start,
)


def refine(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Any MLX checkpoint: a folder or org/name.")
    ],
    source: Annotated[
        str, typer.Option(metavar="MODEL", help="The unquantized model that it was made from.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write; NAME-refined otherwise.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Steps of at most 1,024 tokens; 200 otherwise."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output folder.")
    ] = False,
    work_dir: WorkDirOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Distil a checkpoint's scales and biases on text that its source wrote: same bytes, closer to
    it.
    """
    output = start(as_json, work_dir, long=True)
    from ..jobs.refine import refine_checkpoint

    path, found = refine_checkpoint(checkpoint, source, out, steps, force, output)
    output.close()
    output.line(
        f"{path}: KL from the source on held-out text {found.before:.4g} -> {found.after:.4g} nats "
        "a token"
    )
    output.result({"path": str(path), "kl_before": found.before, "kl_after": found.after})
    output.line(f"mlx_lm.chat --model {shlex.quote(str(path))}")
