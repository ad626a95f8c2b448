"""One module after another: read, hand over, release.

What passes over a model's weights (profile, convert) goes through here where it can't go row by row
(rows.py, converters/rowwise.py), so that memory holds one layer at a time, and the next one on its
way. An evaluated array never becomes lazy again, so every pass opens the model anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from ..base.streams import reading
from .arrays import check_finite
from .layers import MLX_DTYPES, Inventory
from .source import Source, open_model

# bytes read ahead; a larger layer waits its turn, since stacking its experts takes twice that
AHEAD = 1_500_000_000


def _nbytes(tensors: dict[str, mx.array]) -> int:
    return sum(array.nbytes for array in tensors.values())


def _carried(source: Source, owners: set[str]) -> dict[str, dict[str, mx.array]]:
    """Lazy tensors of modules that mlx-lm's model lacks, straight from the shards."""
    found: dict[str, dict[str, mx.array]] = {}
    files = [
        f
        for f, table in source.headers.items()
        if any(n.rpartition(".")[0] in owners for n in table)
    ]
    for file in files:
        with mx.stream(reading()):
            loaded: dict[str, mx.array] = mx.load(str(source.path / file))  # type: ignore[assignment]
        for name, array in loaded.items():
            owner, _, local = name.rpartition(".")
            if owner in owners:
                found.setdefault(owner, {})[local] = array
    return found


def stream(
    source: Source, inventory: Inventory, paths: Sequence[str], allow_nonfinite: bool = False
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Yield each module's evaluated parameters, by local name, in the types that they will be
    written in.

    Args:
        source: a checkpoint whose weights are here.
        inventory: its layers, for the types.
        paths: the modules wanted, in the model's order (two that share a fused source tensor stand
            side by side there).
        allow_nonfinite: don't refuse NaN and infinite weights.

    Raises:
        MintError: weights aren't finite.
    """
    wanted = set(paths)
    dtypes = {spec.name: spec.dtype for specs in inventory.others.values() for spec in specs}
    for layer in inventory.layers:
        dtypes |= {spec.name: spec.dtype for spec in layer.extras}
        if layer.stored is None:
            dtypes[f"{layer.path}.weight"] = layer.dtype
        elif layer.stored.mode == "affine":
            dtypes |= dict.fromkeys((f"{layer.path}.scales", f"{layer.path}.biases"), layer.dtype)
    arrays: dict[str, dict[str, mx.array]] = {}
    model = open_model(source, reading())
    for name, array in tree_flatten(model.parameters()):
        owner, _, local = name.rpartition(".")
        if owner in wanted:
            arrays.setdefault(owner, {})[local] = array
    arrays |= _carried(source, wanted - arrays.keys())
    if paths:
        del model, array  # from here on `arrays` alone keeps the lazy weights

    def begin(path: str) -> dict[str, mx.array]:
        """Start to read a module."""
        tensors = arrays.pop(path)
        with mx.stream(reading()):  # the disk is read here, never inside a GPU command buffer
            for local, array in tensors.items():
                code = dtypes.get(f"{path}.{local}".lstrip("."))
                dtype = (
                    getattr(mx, MLX_DTYPES[code].replace("bool", "bool_")) if code else array.dtype
                )
                tensors[local] = array if array.dtype == dtype else array.astype(dtype)
        mx.async_eval(tensors)
        return tensors

    room = min(AHEAD, max((_nbytes(arrays[path]) for path in paths), default=0))
    begun: deque[dict[str, mx.array]] = deque()
    left = deque(paths)
    for path in paths:
        if not begun:
            begun.append(begin(left.popleft()))
        tensors = begun.popleft()
        mx.eval(tensors)
        ahead = sum(map(_nbytes, begun))
        while left and ahead + _nbytes(arrays[left[0]]) <= room:
            begun.append(begin(left.popleft()))
            ahead += _nbytes(begun[-1])
        if not allow_nonfinite:
            check_finite(path, tensors)
        yield path, tensors
        del tensors
        mx.clear_cache()
