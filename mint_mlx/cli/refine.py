"""`mint-mlx refine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOpt, KeepTwinOpt, NoTwinOpt, TwinOpt, WorkDirOpt, start


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
    twin: TwinOpt = None,
    keep_twin: KeepTwinOpt = None,
    no_twin: NoTwinOpt = False,
    work_dir: WorkDirOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Bring a quantized checkpoint closer to its source, at the same bytes.

    Its scales and biases are distilled on text that the source writes
    (docs/guides/refine-any-checkpoint.md).
    """
    output = start(as_json, work_dir, long=True)
    from ..checkpoint.run_command import run_command
    from ..jobs.refine import refine as distil

    result = distil(
        checkpoint,
        source,
        out,
        steps=steps,
        force=force,
        twin=twin,
        keep_twin=keep_twin,
        no_twin=no_twin,
        report=output,
    )
    output.close()
    output.line(
        f"{result.path}: KL from the source on held-out text {result.kl_before:.4g} -> "
        f"{result.kl_after:.4g} nats a token"
    )
    output.result(
        {
            "path": str(result.path),
            "kl_before": result.kl_before,
            "kl_after": result.kl_after,
        }
    )
    output.line(run_command(result.path, str(result.path)))
