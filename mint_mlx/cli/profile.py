"""`mint-mlx profile`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    JsonOpt,
    ModelArg,
    PartsOpt,
    RecipeOpt,
    SampleOpt,
    start,
)


def profile(
    model: ModelArg,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="PROFILE", help="File to write; NAME.profile.json otherwise."
        ),
    ] = None,
    parts: PartsOpt = None,
    recipe: RecipeOpt = None,
    sample: SampleOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure the error of every layer at every candidate; one profile serves every budget."""
    output = start(as_json, long=True, shared=True)
    from ..jobs import steps

    path, made = steps.write_profile(model, out, recipe, parts or "text", output, sample)
    output.close()
    output.line(f"{path}: {len(made.curves)} layers{made.sampled}")
    output.line(f"Next: mint-mlx allocate {shlex.quote(str(path))} --budget 4.5bpw -o plan.yaml")
    output.result(
        {
            "profile": str(path),
            "layers": len(made.curves),
            "fingerprint": made.origin.fingerprint,
            "sample": made.sample,
        }
    )
