"""The file of a reference: safetensors, which `eval --save-reference` writes and --source reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import MintError
from ..base.files import write_arrays
from ..base.targets import check_file
from .protocol import Windows
from .reference import PER_POSITION, SCHEMA, About, Predictions, Reference

MARKER = "mint_mlx_reference"  # in every file of ours, in the metadata of its header
IS_OURS = rb'\A.{8}\{"__metadata__":\{.*"mint_mlx_reference":"'
STORED = (*PER_POSITION, "whole", "whole_logp", "control")


def check_reference_file(path: Path) -> None:
    """Refuse a path that a reference can't be written to, or a file that is something else.

    Raises:
        MintError: saying why.
    """
    if path.suffix != ".safetensors":
        raise MintError(
            f"--save-reference {path} must end in .safetensors, so that --source knows it as a "
            "reference"
        )
    check_file(path, IS_OURS, force=True)  # an older one, also of another version, is replaced


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference as a safetensors file, whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    for i, predictions in enumerate(reference.predictions):
        for name in STORED:
            arrays[f"{i}.{name}"] = np.ascontiguousarray(getattr(predictions, name))
        arrays[f"{i}.tokens"] = predictions.windows.tokens
        for layer, experts in enumerate(predictions.routing):
            arrays[f"{i}.routing.{layer}"] = experts

    about: dict[str, Any] = asdict(reference.about)
    about["firsts"] = [predictions.windows.first for predictions in reference.predictions]
    write_arrays(path, arrays, {MARKER: json.dumps(about)})


def load_reference(path: Path) -> Reference:
    """Read a reference.

    Raises:
        MintError: there is no such file, or it isn't a reference of this version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MintError(
            f"there is no reference {path}: make one with `mint-mlx eval MODEL --source REF "
            "--save-reference FILE`"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[MARKER])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        firsts = about.pop("firsts")
        if about["schema"] != SCHEMA:
            raise MintError(f"{path} was made by another version of mint-mlx: make it anew")
        predictions = [_read_predictions(arrays, i, first) for i, first in enumerate(firsts)]
        return Reference(About(**about), tuple(predictions))
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise MintError(
            f"{path} is not a reference of mint-mlx: make one with --save-reference"
        ) from None


def _read_predictions(arrays: dict[str, np.ndarray], i: int, first: int) -> Predictions:
    """The predictions for the i-th set of windows; `first` is their first scored token."""
    layers = sum(name.startswith(f"{i}.routing.") for name in arrays)
    routing = tuple(arrays[f"{i}.routing.{layer}"] for layer in range(layers))
    fields = {name: arrays[f"{i}.{name}"] for name in STORED}
    return Predictions(Windows(arrays[f"{i}.tokens"], first), routing=routing, **fields)
