"""A sensitivity's file: one .npz with the model's own tokens in it, written whole and read with
suspicion.
"""

from __future__ import annotations

import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import MintError
from ..base.files import atomic_write
from ..checkpoint.origin import Origin
from .sensitivity import SCHEMA, Sensitivity, TokenWeights, halved

MARKER = "mint_mlx_sensitivity"  # in every file of ours


def save_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Write a sensitivity with its tokens as one .npz, whole or not at all."""
    head = {
        MARKER: SCHEMA,
        "source": sensitivity.origin.source,
        "structure": sensitivity.origin.structure,
        "content": sensitivity.origin.content,
        "how": sensitivity.how,
        "layers": list(sensitivity.trace),
        "followed": list(sensitivity.weights),
        "left": sensitivity.remaining,
    }
    arrays: dict[str, np.ndarray] = {
        "head": np.array(json.dumps(head)),
        "tokens": sensitivity.tokens,
    }
    arrays |= {f"trace.{i}": trace for i, trace in enumerate(sensitivity.trace.values())}

    # Gate, up and down are routed alike, so their experts are stored once.
    routes: dict[bytes, int] = {}
    for i, weights in enumerate(sensitivity.weights.values()):
        arrays[f"weight.{i}"], scale = halved(weights.weight)
        arrays[f"weight.{i}.by"] = np.array(scale)
        if weights.expert is not None:
            route = weights.expert.astype(np.min_scalar_type(int(weights.expert.max())))
            first = routes.setdefault(route.tobytes(), i)
            arrays[f"route.{i}"] = np.array(first)
            arrays[f"part.{first}"] = route

    # Matrices take 16 bits a number and one scale each, which they were rounded to when measured.
    matrices = {f"metric.{block}": matrix for block, matrix in sensitivity.metric.items()}
    if sensitivity.embedding is not None:
        matrices["embedding"] = sensitivity.embedding
    for name, matrix in matrices.items():
        arrays[name], scale = halved(matrix)
        arrays[f"{name}.scale"] = np.array(scale)

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


_DAMAGED = (  # all that zip, zlib and numpy raise
    *(
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        NotImplementedError,
        SyntaxError,
        OverflowError,
    ),
    *(MemoryError, zipfile.BadZipFile, zlib.error, tokenize.TokenError, struct.error),
)


def is_sensitivity(path: Path) -> bool:
    """Whether a file was written by `save_sensitivity`, of whatever version."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return MARKER in json.loads(str(arrays["head"]))
    except (OSError, *_DAMAGED):
        return False


def load_sensitivity(path: Path) -> Sensitivity:
    """Read what `save_sensitivity` wrote.

    Raises:
        MintError: the file is missing, damaged, or of another version of this program.
    """
    if path.is_dir():
        raise MintError(f"{path} is a folder: give a file")
    if not path.is_file():
        raise MintError(
            f"there is no sensitivity {path}: make one with `mint-mlx sensitivity MODEL -o {path}`"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(str(arrays["head"]))
            if head[MARKER] != SCHEMA:
                raise ValueError("of another version")
            return _from_arrays(head, arrays)
    except _DAMAGED:
        raise MintError(
            f"{path} is not a sensitivity of this version: make one with `mint-mlx sensitivity "
            f"MODEL -o {path}`"
        ) from None


def _from_arrays(head: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Sensitivity:
    """A sensitivity from its file's header and arrays; damaged ones raise one of _DAMAGED."""
    matrices = {
        name.removesuffix(".scale"): arrays[name.removesuffix(".scale")].astype(np.float32)
        * arrays[name]
        for name in arrays
        if name.endswith(".scale")
    }
    embedding = matrices.pop("embedding", None)
    return Sensitivity(
        Origin(head["source"], None, head["structure"], head["content"]),
        arrays["tokens"],
        head["how"],
        {layer: arrays[f"trace.{i}"] for i, layer in enumerate(head["layers"])},
        _token_weights(head["followed"], arrays),
        {int(name.removeprefix("metric.")): matrix for name, matrix in matrices.items()},
        embedding,
        {str(layer): float(share) for layer, share in dict(head["left"]).items()},
    )


def _token_weights(
    layers: Sequence[str], arrays: Mapping[str, np.ndarray]
) -> dict[str, TokenWeights]:
    """The token weights of these layers, with the experts that each token took."""
    routes = {name: arrays[name].astype(np.int32) for name in arrays if name.startswith("part.")}
    weights = {}
    for i, layer in enumerate(layers):
        weight = arrays[f"weight.{i}"].astype(np.float32) * arrays[f"weight.{i}.by"]
        expert = routes[f"part.{arrays[f'route.{i}']}"] if f"route.{i}" in arrays else None
        weights[layer] = TokenWeights(weight, expert)
    return weights
