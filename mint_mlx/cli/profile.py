"""`mint-mlx profile`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOpt, ModelArg, PartsOpt, RecipeOpt, SampleOpt, start


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
    """Measure the error that each number of bits makes in every layer.

    One profile serves every budget (docs/guides/reuse-measurements.md).
    """
    output = start(as_json, long=True, shared=True)
    from ..jobs import steps

    path, measured = steps.write_profile(model, out, recipe, parts or "text", output, sample)
    output.close()
    layers = len(measured.curves)
    output.line(f"{path}: {layers} layers{measured.sampled}")
    output.line(f"Next: mint-mlx allocate {shlex.quote(str(path))} --budget 4.5bpw -o plan.yaml")
    output.result(
        {
            "profile": str(path),
            "layers": layers,
            "fingerprint": measured.origin.fingerprint,
            "sample": measured.sample,
        }
    )
