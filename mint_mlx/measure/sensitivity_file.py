"""A sensitivity's file: one .npz with the model's own tokens in it, written whole and read with
suspicion.
"""

from __future__ import annotations

import json
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

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
        "left": sensitivity.left,
    }
    arrays: dict[str, np.ndarray] = {
        "head": np.array(json.dumps(head)),
        "tokens": sensitivity.tokens,
    }
    arrays |= {f"trace.{i}": trace for i, trace in enumerate(sensitivity.trace.values())}
    routes: dict[bytes, int] = {}
    for i, weights in enumerate(sensitivity.weights.values()):
        arrays[f"weight.{i}"], scale = halved(weights.weight)
        arrays[f"weight.{i}.by"] = np.array(scale)
        if weights.expert is not None:
            route = weights.expert.astype(np.min_scalar_type(int(weights.expert.max())))
            first = routes.setdefault(route.tobytes(), i)  # gate, up and down are routed alike
            arrays[f"route.{i}"] = np.array(first)
            arrays[f"part.{first}"] = route
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
    wrong = MintError(
        f"{path} is not a sensitivity of this version: make one with `mint-mlx sensitivity MODEL "
        f"-o {path}`"
    )
    if not path.is_file():
        raise MintError(
            f"there is no sensitivity {path}: make one with `mint-mlx sensitivity MODEL -o {path}`"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(str(arrays["head"]))
            if head[MARKER] != SCHEMA:
                raise wrong
            count = len(head["followed"])
            trace = {layer: arrays[f"trace.{i}"] for i, layer in enumerate(head["layers"])}
            parts = {
                name: arrays[name].astype(np.int32) for name in arrays if name.startswith("part.")
            }
            routes = {
                i: parts[f"part.{arrays[f'route.{i}']}"]
                for i in range(count)
                if f"route.{i}" in arrays
            }
            weights = {
                layer: TokenWeights(
                    arrays[f"weight.{i}"].astype(np.float32) * arrays[f"weight.{i}.by"],
                    routes.get(i),
                )
                for i, layer in enumerate(head["followed"])
            }
            matrices = {
                name.removesuffix(".scale"): arrays[name.removesuffix(".scale")].astype(np.float32)
                * arrays[name]
                for name in arrays
                if name.endswith(".scale")
            }
            embedding = matrices.pop("embedding", None)
            metric = {
                int(name.removeprefix("metric.")): matrix for name, matrix in matrices.items()
            }
            origin = Origin(head["source"], None, head["structure"], head["content"])
            tokens = arrays["tokens"]
            how = head["how"]
            left = {str(layer): float(share) for layer, share in dict(head["left"]).items()}
    except _DAMAGED:
        raise wrong from None
    return Sensitivity(origin, tokens, how, trace, weights, metric, embedding, left)
