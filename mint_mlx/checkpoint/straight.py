"""Which parameters of a model are tensors of its files as they are, rows or stacks of such.

`load_model` of mlx-lm reads shards through `mlx.core.load`, and `sanitize` stacks experts by
`mlx.core.stack`, or takes some rows of a tensor that holds two projections: all of these are
patched while a model is built lazily.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from ..converters.sources.restore import graph_of
from .mlxlm import build_model


class Piece(NamedTuple):
    """A tensor of a file that a parameter is, or is a part of; `first` is its first row there."""

    file: str
    name: str
    first: int = 0


def straight_parameters(folder: Path) -> dict[str, list[Piece]]:
    """The model's parameters that are tensors of the checkpoint, rows of one, or stacks of tensors.

    Stacks are along the first axis only, as those of experts are.

    Returns:
        By the parameter's name what it is made of, in order.
    """
    with _trace_arrays() as origins:
        model = build_model(folder)
        straight = {}
        for name, array in tree_flatten(model.parameters()):
            origin = origins.get(id(array))
            if origin is not None and origin.graph == graph_of(array):
                straight[name] = origin.tensors
        return straight


@lru_cache(maxsize=2)
def source_parameters(folder: Path, structure: str) -> dict[str, list[Piece]]:
    """The same of a source, built once for all that ask: it follows from config and headers alone.

    Args:
        folder: of the source.
        structure: the hash of these.
    """
    return straight_parameters(folder)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """Where an array comes from.

    Attributes:
        tensors: that it is made of, in order.
        graph: how it was computed then. `sanitize` may scale an array in place, as Falcon-H1's
            does: its id stays.
    """

    tensors: list[Piece]
    graph: str


@contextlib.contextmanager
def _trace_arrays() -> Iterator[dict[int, _Traced]]:
    """Record from which tensors loaded arrays and stacks of them come, by patching mlx.core.

    Yields:
        By the id of an array where it comes from; valid inside the context only.
    """
    origins: dict[int, _Traced] = {}
    references: list[mx.array] = []  # Python reuses the id of an array that is gone
    load, stack, take = mx.load, mx.stack, mx.array.__getitem__

    def traced_load(file: Any, *args: Any, **options: Any) -> Any:
        loaded: Any = load(file, *args, **options)
        if isinstance(loaded, dict):
            for name, array in loaded.items():
                origins[id(array)] = _Traced([Piece(Path(str(file)).name, name)], graph_of(array))
                references.append(array)
        return loaded

    def traced_stack(arrays: Any, axis: int = 0, **options: Any) -> Any:
        arrays = list(arrays)
        stacked = stack(arrays, axis, **options)
        parts = [origins.get(id(array)) for array in arrays]
        tensors = [
            part.tensors[0]
            for part, array in zip(parts, arrays, strict=True)
            if part is not None and len(part.tensors) == 1 and part.graph == graph_of(array)
        ]
        if axis == 0 and len(tensors) == len(arrays):
            origins[id(stacked)] = _Traced(tensors, graph_of(stacked))
            references.append(stacked)
        return stacked

    def traced_take(array: mx.array, index: Any) -> Any:
        taken = take(array, index)
        part, first = origins.get(id(array)), _first_row(array, index)
        if part is not None and first is not None and part.graph == graph_of(array):
            tensors = [piece._replace(first=piece.first + first) for piece in part.tensors]
            origins[id(taken)] = _Traced(tensors, graph_of(taken))
            references.append(taken)
        return taken

    # Whatever else `sanitize` does makes arrays of other ids or other graphs.
    mx.load, mx.stack = traced_load, traced_stack  # type: ignore[assignment]
    mx.array.__getitem__ = traced_take  # type: ignore[method-assign]
    try:
        yield origins
    finally:
        mx.load, mx.stack = load, stack
        mx.array.__getitem__ = take  # type: ignore[method-assign]


def _first_row(array: mx.array, index: Any) -> int | None:
    """The first row of `array[..., first:end, :]` of a stack; None for any other index."""
    if array.ndim != 3 or not isinstance(index, tuple) or len(index) not in (2, 3):
        return None
    before, rows, columns = index if len(index) == 3 else (index[0], index[1], slice(None))
    if before is not Ellipsis and before != slice(None):
        return None
    if not isinstance(rows, slice) or rows.step not in (None, 1) or columns != slice(None):
        return None
    if before is Ellipsis and len(index) == 2:  # those are columns
        return None
    return rows.indices(array.shape[1])[0]
