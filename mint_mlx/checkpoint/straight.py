"""Which parameters of a model are tensors of its files as they are, or stacks of such.

`load_model` of mlx-lm reads shards through `mlx.core.load`, and `sanitize` stacks experts by
`mlx.core.stack`: both are patched while a model is built lazily.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..converters.sources.restore import graph_of
from .mlxlm import build_model


def straight_parameters(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The model's parameters that are unchanged tensors of the checkpoint, or stacks of such.

    Stacks are along the first axis only, as those of experts are.

    Returns:
        By the parameter's name the tensors, as (file, name), that it is made of, in order.
    """
    with _trace_arrays() as origins:
        model = build_model(folder)
        straight = {}
        for name, array in tree_flatten(model.parameters()):
            origin = origins.get(id(array))
            if origin is not None and origin.graph == graph_of(array):
                straight[name] = origin.tensors
        return straight


@dataclasses.dataclass(frozen=True)
class _Traced:
    """Where an array comes from.

    Attributes:
        tensors: (file, name) of the tensors that it is made of, in order.
        graph: how it was computed then. `sanitize` may scale an array in place, as Falcon-H1's
            does: its id stays.
    """

    tensors: list[tuple[str, str]]
    graph: str


@contextlib.contextmanager
def _trace_arrays() -> Iterator[dict[int, _Traced]]:
    """Record from which tensors loaded arrays and stacks of them come, by patching mlx.core.

    Yields:
        By the id of an array where it comes from; valid inside the context only.
    """
    origins: dict[int, _Traced] = {}
    references: list[mx.array] = []  # Python reuses the id of an array that is gone
    load, stack = mx.load, mx.stack

    def traced_load(file: Any, *args: Any, **options: Any) -> Any:
        loaded: Any = load(file, *args, **options)
        if isinstance(loaded, dict):
            for name, array in loaded.items():
                origins[id(array)] = _Traced([(Path(str(file)).name, name)], graph_of(array))
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

    # Whatever `sanitize` does besides stacking makes arrays of other ids or other graphs.
    mx.load, mx.stack = traced_load, traced_stack  # type: ignore[assignment]
    try:
        yield origins
    finally:
        mx.load, mx.stack = load, stack
