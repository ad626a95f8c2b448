"""The file of a reference: safetensors, which `eval --save-reference` writes and --source reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..base import schema
from ..base.array_files import read_arrays, write_arrays
from ..base.checksum import KEY, Damaged
from ..base.errors import MintError
from ..base.targets import check_file
from .protocol import Windows
from .reference import PER_POSITION, SCHEMA, About, Predictions, Reference

MARKER = "mint_mlx_reference"  # in every file of ours, in the metadata of its header
IS_OURS = rb'\A.{8}\{"__metadata__":\{.*"mint_mlx_reference":"'
STORED = (*PER_POSITION, "whole", "whole_logp", "control")
NONE = -1e30  # stands for the log of no mass at all, which is no number
EXCESS = 1e-3  # by which rounding may take probabilities above 1 in all


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
    # An older one, also of another version, is replaced.
    check_file(path, IS_OURS, force=True, option="--save-reference")


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
    about["checked"] = True  # files of earlier versions have no checksum
    about["firsts"] = [predictions.windows.first for predictions in reference.predictions]
    write_arrays(path, arrays, {MARKER: json.dumps(about)})


def load_reference(path: Path) -> Reference:
    """Read a reference.

    Raises:
        Damaged: bytes of it have changed, its numbers are no probabilities, or it is something
            else.
        MintError: there is no such file, or it is of another version.
    """
    if not path.is_file():
        raise MintError(
            f"there is no reference {path}: make one with `mint-mlx eval MODEL --source REF "
            "--save-reference FILE`"
        )
    damaged = Damaged(
        f"{path} is not a reference of mint-mlx, or a damaged one: make one with --save-reference"
    )
    try:
        arrays, metadata = read_arrays(path, old=True)
        data: dict[str, Any] = json.loads(metadata[MARKER])
        firsts = data.pop("firsts")
        if data.pop("checked", False) and KEY not in metadata:
            raise ValueError("its checksum is missing")
        if data["schema"] == SCHEMA:
            about = _about(data)
            if not firsts:
                raise ValueError("no windows")
            sets = [_read_predictions(arrays, i, first, about) for i, first in enumerate(firsts)]
            return Reference(about, tuple(sets))
    except (Damaged, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise damaged from None
    raise MintError(f"{path} was made by another version of mint-mlx: make it anew")


def _about(data: dict[str, Any]) -> About:
    """What a reference belongs to (a ValueError or TypeError where the file doesn't say it)."""
    for key in ("source", "fingerprint", "protocol", "text", "tokenizer", "device"):
        schema.text(data[key])
    schema.integer(data["vocabulary"], 1, 2**31)
    if data["noise_floor"] is not None:
        schema.number(data["noise_floor"], 0)
    return About(**data)


def _read_predictions(
    arrays: dict[str, np.ndarray], i: int, first: Any, about: About
) -> Predictions:
    """The predictions for the i-th set of windows; `first` is their first scored token.

    Raises:
        KeyError, ValueError: an array is missing, has another shape, or is no distribution.
    """
    fields = {name: arrays[f"{i}.{name}"] for name in STORED}
    last = about.vocabulary - 1
    tokens = schema.check_array(arrays[f"{i}.tokens"], schema.INTEGER, (None, None), 0, last)
    windows = Windows(tokens.astype(np.int32), schema.integer(first, 1, tokens.shape[1] - 1))

    # Positions: ids and log-probabilities of the K best, and the mass of all others.
    count = len(tokens) * windows.per_window
    logp = schema.check_array(fields["logp"], schema.FLOAT, (count, None), high=EXCESS)
    schema.check_array(fields["ids"], schema.INTEGER, logp.shape, 0, last)
    schema.check_array(fields["best"], schema.INTEGER, (count,), 0, last)
    schema.check_array(fields["true"], schema.FLOAT, (count,), high=EXCESS)
    rest = np.where(np.isneginf(fields["rest"]), NONE, fields["rest"])
    schema.check_array(rest, schema.FLOAT, (count,), high=EXCESS)
    _check_mass(logp, rest)

    # Those stored whole, each once.
    whole = schema.check_array(fields["whole"], schema.INTEGER, (None,), 0, count - 1)
    whole_logp = fields["whole_logp"]
    schema.check_array(whole_logp, schema.FLOAT, (len(whole), about.vocabulary), high=EXCESS)
    _check_mass(whole_logp, np.full(len(whole), NONE))
    if len(np.unique(whole)) != len(whole):
        raise ValueError("a position twice")

    schema.check_array(fields["control"], schema.BOOL, (windows.scored,))
    layers = sum(name.startswith(f"{i}.routing.") for name in arrays)
    routing = tuple(arrays[f"{i}.routing.{layer}"] for layer in range(layers))
    for experts in routing:
        schema.check_array(experts, schema.INTEGER, (*tokens.shape, None), 0, 2**16)
    return Predictions(windows, routing=routing, **fields)


def _check_mass(logp: np.ndarray, rest: np.ndarray) -> None:
    """Refuse log-probabilities (n, K) that don't add up to one with those of all other tokens.

    Raises:
        ValueError: they don't.
    """
    mass = np.exp(logp).sum(axis=-1, dtype=np.float64) + np.exp(rest)
    if mass.size and np.abs(mass - 1).max() > EXCESS:
        raise ValueError("no distribution")
