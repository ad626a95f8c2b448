"""A sensitivity's file: one .npz with the model's own tokens in it, written whole and read with
suspicion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base import schema
from ..base.array_files import read_npz, write_npz
from ..base.checksum import KEY, Damaged
from ..base.errors import MintError
from ..checkpoint.layers import Inventory, Layer
from .profile_file import origin_from
from .sensitivity import SCHEMA, Sensitivity, TokenWeights, halved
from .text import Text

MARKER = "mint_mlx_sensitivity"  # in every file of ours
LARGEST = 1e100  # a trace; larger ones would overflow where they weigh errors


def save_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Write a sensitivity with its tokens as one .npz, whole or not at all."""
    head = {
        MARKER: SCHEMA,
        "source": sensitivity.origin.source,
        "structure": sensitivity.origin.structure,
        "content": sensitivity.origin.content,
        "how": sensitivity.text.how,
        "layers": list(sensitivity.trace),
        "followed": list(sensitivity.weights),
        "left": sensitivity.remaining,
        "checked": True,  # files of earlier versions have no checksum
    }
    arrays: dict[str, np.ndarray] = {
        "head": np.array(json.dumps(head)),
        "tokens": sensitivity.tokens,
        "given": sensitivity.text.given,
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

    write_npz(path, arrays, compressed=True)


_WRONG = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def is_sensitivity(path: Path) -> bool:
    """Whether a file was written by `save_sensitivity`, of whatever version."""
    try:
        return MARKER in json.loads(str(read_npz(path, old=True)["head"]))
    except (OSError, MintError, *_WRONG):
        return False


def load_sensitivity(path: Path) -> Sensitivity:
    """Read what `save_sensitivity` wrote.

    Raises:
        Damaged: bytes of it have changed, its numbers are impossible, or it is something else.
        MintError: the file is missing, or of another version of this program.
    """
    if path.is_dir():
        raise MintError(f"{path} is a folder: give a file")
    if not path.is_file():
        raise MintError(
            f"there is no sensitivity {path}: make one with `mint-mlx sensitivity MODEL -o {path}`"
        )
    advice = f"make one with `mint-mlx sensitivity MODEL -o {path}`"
    try:
        arrays = read_npz(path, old=True)
        head = json.loads(str(arrays["head"]))
        if "checked" in head and KEY not in arrays:
            raise ValueError("arrays are missing")
        if head[MARKER] == SCHEMA:
            return _from_arrays(head, arrays)
    except (Damaged, *_WRONG):
        raise Damaged(f"{path} is not a sensitivity, or a damaged one: {advice}") from None
    raise MintError(f"{path} is not a sensitivity of this version: {advice}")


def _from_arrays(head: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Sensitivity:
    """A sensitivity from its file's header and arrays; damaged ones raise one of _WRONG."""
    tokens = schema.check_array(arrays["tokens"], schema.INTEGER, (None, None), 0, 2**31 - 1)
    windows, length = tokens.shape
    given = schema.check_array(arrays["given"], schema.INTEGER, (windows,), 1, length)
    matrices = {
        name.removesuffix(".scale"): _scaled(arrays[name.removesuffix(".scale")], arrays[name])
        for name in arrays
        if name.endswith(".scale")
    }
    embedding = matrices.pop("embedding", None)

    trace = {
        schema.text(layer): schema.check_array(
            arrays[f"trace.{i}"], schema.FLOAT, (None,), 0, LARGEST
        )
        for i, layer in enumerate(head["layers"])
    }
    shares = {layer: schema.number(share, 0, 2) for layer, share in head["left"].items()}
    if not tokens.size or not trace or not shares.keys() <= trace.keys():
        raise ValueError("it is empty, or names layers that it doesn't follow")

    return Sensitivity(
        origin=origin_from(head, None),
        text=Text(tokens.astype(np.int32), schema.text(head["how"]), given.astype(np.int32)),
        trace=trace,
        weights=_token_weights(head["followed"], arrays, tokens.shape),
        metric={int(name.removeprefix("metric.")): matrix for name, matrix in matrices.items()},
        embedding=embedding,
        remaining=shares,
    )


def _scaled(half: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A matrix from what `halved` made of it, float32 and finite (else a ValueError)."""
    schema.check_array(half, schema.FLOAT, [None] * half.ndim, -1, 1)
    schema.check_array(scale, schema.FLOAT, (), 0)
    matrix: np.ndarray = half.astype(np.float32) * scale
    return schema.check_array(matrix, schema.FLOAT, [None] * half.ndim)


def _token_weights(
    layers: Sequence[str], arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> dict[str, TokenWeights]:
    """The token weights of these layers, with the experts that each token took.

    Args:
        layers: their paths.
        arrays: of the file.
        shape: (windows, tokens) of the text, the first of which were measured.

    Raises:
        ValueError, KeyError, TypeError: they aren't those of the first windows of such a text.
    """
    windows, length = shape
    tokens = len(arrays["weight.0"]) if layers else windows * length
    if not 0 < tokens <= windows * length or tokens % length:
        raise ValueError("they are of no whole windows")
    routes = {
        name: schema.check_array(arrays[name], schema.INTEGER, (tokens, None), 0).astype(np.int32)
        for name in arrays
        if name.startswith("part.")
    }
    weights = {}
    for i, layer in enumerate(layers):
        weight = _scaled(arrays[f"weight.{i}"], arrays[f"weight.{i}.by"])
        expert = routes[f"part.{arrays[f'route.{i}']}"] if f"route.{i}" in arrays else None
        slots = 1 if expert is None else expert.shape[1]
        schema.check_array(weight, schema.FLOAT, (tokens, slots), 0)
        weights[schema.text(layer)] = TokenWeights(weight, expert)
    return weights


def check_sensitivity(sensitivity: Sensitivity, inventory: Inventory) -> None:
    """Hold a sensitivity that was read from a file against its model's layers.

    Raises:
        Damaged: it isn't one of this model.
    """
    layers = {layer.path: layer for layer in inventory.layers}
    try:
        _check_layers(sensitivity, layers)
        _check_matrices(sensitivity, layers)
    except (ValueError, KeyError) as error:
        raise Damaged(
            f"the sensitivity doesn't fit the model ({error}): measure it anew with `mint-mlx "
            "sensitivity`"
        ) from None


def _check_layers(sensitivity: Sensitivity, layers: Mapping[str, Layer]) -> None:
    """Raise a ValueError or KeyError where traces, experts or tokens aren't those of the layers."""
    rows = max(layer.shape[0] for layer in layers.values() if layer.role == "embedding")
    schema.check_array(sensitivity.tokens, schema.INTEGER, (None, None), 0, rows - 1)
    for path, trace in sensitivity.trace.items():
        layer = layers[path]
        count = layer.shape[0] if len(layer.shape) > 2 else 1
        schema.check_array(trace, schema.FLOAT, (count,), 0)
    for path, weights in sensitivity.weights.items():
        if weights.expert is not None:
            schema.check_array(
                weights.expert, schema.INTEGER, (None, None), 0, layers[path].experts - 1
            )


def _check_matrices(sensitivity: Sensitivity, layers: Mapping[str, Layer]) -> None:
    """Raise a ValueError where a metric isn't that of a block, or of another hidden size."""
    blocks = {layer.block for layer in layers.values()}
    widths = {n for layer in layers.values() for n in layer.shape[-2:]}
    for block, metric in sensitivity.metric.items():
        square = len(set(metric.shape)) == 1 and metric.ndim <= 2
        if block not in blocks or not square or metric.shape[0] not in widths:
            raise ValueError(f"the metric of block {block}")
    hidden = {layer.shape[-1] for layer in layers.values() if layer.role == "embedding"}
    embedding = sensitivity.embedding
    if embedding is not None and (embedding.ndim != 2 or set(embedding.shape) - hidden):
        raise ValueError("the embedding's moments")
