"""What scales the inputs of a layer, column by column: a norm's gain, or the rows of another layer.

A column of weights whose inputs are twice as large costs four times as much where it is wrong. How
large inputs are is mostly in the file: a norm before the layer multiplies each column by its gain,
and what an MLP's last projection reads is proportional to the outputs of the layer called `up`.

Both are learned from the stock model, run on a few tokens with its norms and layers returning
numbers that are drawn in place of their outputs: a layer whose input is proportional to the numbers
of a norm reads that norm, and one whose input doubles with those of another layer is proportional
to it. So neither names of norms nor the code of families matter, and no weight is evaluated.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.roles import DOWN
from . import patching
from .taps import HEADS, KINDS

TOKENS = 4  # that the model is run on
TOLERANCE = 0.02  # of proportions, in 16 bits


@dataclass(frozen=True)
class Scales:
    """Where the inputs of layers come from.

    Attributes:
        norms: by layer path, the path of the norm whose output it reads.
        factors: by path of an MLP's last projection, the path of the layer to whose outputs its
            inputs are proportional.
    """

    norms: dict[str, str]
    factors: dict[str, str]


@dataclass(frozen=True)
class _Run:
    """One run of a model.

    Attributes:
        inputs: what each layer read, float32 (rows, columns), by path; all calls in one.
        norms: the numbers that each norm returned, float32 (columns,), by path.
    """

    inputs: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]


def trace(model: nn.Module) -> Scales:
    """Learn where the inputs of a model's layers come from; its weights are not evaluated.

    Args:
        model: a (lazy) mlx-lm model.
    """
    run = _run(model)
    norms = {}
    for path, x in run.inputs.items():
        norm = _proportional(x, run.norms)
        if norm is not None:
            norms[path] = norm

    # The neighbours of a last projection are doubled one after the other.
    modules = dict(model.named_modules())
    neighbours = {path: _neighbours(modules, path) for path in run.inputs if path.endswith(DOWN)}
    factors: dict[str, str] = {}
    for index in range(max(map(len, neighbours.values()), default=0)):
        tried = {path: names[index] for path, names in neighbours.items() if index < len(names)}
        doubled = _run(model, set(tried.values())).inputs
        factors |= {
            path: name
            for path, name in tried.items()
            if run.inputs[path].any() and _is_close(doubled[path], 2 * run.inputs[path])
        }
    return Scales(norms, factors)


def gain(norm: nn.Module, columns: int) -> np.ndarray:
    """By how much a norm multiplies each column, float32 (columns,); of an even number of columns.

    It is what the norm makes of inputs of size one whose mean is zero, whatever it adds.
    """
    x = mx.array(np.resize(np.array([1.0, -1.0], dtype=np.float32), columns))
    return np.abs(np.array((norm(x) - norm(-x)).astype(mx.float32))) / 2


def _run(model: nn.Module, doubled: Collection[str] = ()) -> _Run:
    """Run a model whose norms and layers return drawn numbers, those of some layers doubled."""
    paths = {id(module): path for path, module in model.named_modules()}
    norms = {type(m) for m in model.modules() if "Norm" in type(m).__name__}
    inputs: dict[str, list[np.ndarray]] = {}
    returned: dict[str, np.ndarray] = {}

    def change(module: nn.Module, out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        if path is None or not isinstance(out, mx.array):
            return out
        numbers = _numbers(path, out)
        if type(module) in norms:
            if not args and not kwargs:
                returned[path] = np.array(numbers.astype(mx.float32))
        elif not isinstance(module, HEADS):  # those read along their rows as well, in another call
            rows = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
            inputs.setdefault(path, []).append(rows)
        return mx.broadcast_to(2 * numbers if path in doubled else numbers, out.shape)

    with patching.outputs_changed({*KINDS, *norms}, change):
        model(mx.zeros((1, TOKENS), dtype=mx.int32))
    return _Run({path: np.concatenate(rows) for path, rows in inputs.items()}, returned)


def _numbers(path: str, out: mx.array) -> mx.array:
    """Numbers of about one in the type and the last dimension of an output, the same each time."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return mx.array(rng.standard_normal(out.shape[-1]).astype(np.float32)).astype(out.dtype)


def _proportional(x: np.ndarray, norms: dict[str, np.ndarray]) -> str | None:
    """The norm to whose numbers all rows of an input (rows, columns) are proportional, or None."""
    for path, numbers in norms.items():
        if len(numbers) == x.shape[1]:
            scales = x @ numbers / (numbers @ numbers)
            if scales.all() and _is_close(x, scales[:, None] * numbers):
                return path
    return None


def _is_close(values: np.ndarray, others: np.ndarray) -> bool:
    """Whether two arrays of a shape agree within TOLERANCE of their size."""
    if values.shape != others.shape or not (
        np.isfinite(values).all() and np.isfinite(others).all()
    ):
        return False
    return bool(np.linalg.norm(values - others) <= TOLERANCE * np.linalg.norm(others))


def _neighbours(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """The layers beside a last projection that have as many outputs as it has inputs."""
    owner, _, _ = path.rpartition(".")
    columns = modules[path].weight.shape[-1]
    return [
        f"{owner}.{name}"
        for name, child in modules[owner].children().items()
        if isinstance(child, KINDS) and child.weight.shape[-2] == columns
    ]
