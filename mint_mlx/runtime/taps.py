"""What layers read while a model runs, and taps at their outputs for a backward pass.

A "tap" passes a layer's output on, and takes down the gradient that comes back to it; no weight's
gradient is computed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from . import patching
from .cpu_ops import GroupedSwitchLinear, rows_and_experts

LINEAR = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, GroupedSwitchLinear, QuantizedSwitchLinear)
HEADS = (MultiLinear, QuantizedMultiLinear)
KINDS = (*LINEAR, *EXPERTS, *HEADS)


@dataclass(frozen=True)
class Activations:
    """What one layer read in some windows, a row for each token and each expert or head reading it.

    Attributes:
        path: the layer.
        x: float32 (rows, inputs).
        grad: float32 (rows, outputs), the gradient at the layer's output; None in a forward pass.
        expert: int (rows,), the expert or head of each row; None for a layer without.
        token: int (rows,), the token of each row, counted through all windows.
    """

    path: str
    x: mx.array
    grad: mx.array | None
    expert: np.ndarray | None
    token: np.ndarray


Visit = Callable[[Activations], None]
Tap = Callable[[int, mx.array], mx.array]  # (number of the call, output) -> the same output


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        path: the layer.
        x: float32, its input; of experts (rows, inputs).
        shape, dtype: of its output.
        expert, token: int (rows,), those of each row of `x`, for experts.
        heads: whether it is a layer of heads: input and output (windows, heads, tokens, size).
    """

    path: str
    x: mx.array
    shape: tuple[int, ...]
    dtype: mx.Dtype
    expert: np.ndarray | None = None
    token: np.ndarray | None = None
    heads: bool = False

    def activations(
        self, window: int, shape: tuple[int, ...], grad: mx.array | None
    ) -> Activations:
        """What was read, as rows.

        Args:
            window: the first window of this batch; tokens are counted from the first of all.
            shape: (windows, tokens) of this batch.
            grad: of the output's shape, or None.
        """
        first = window * shape[1]
        if self.heads:
            return self._by_head(first, grad)

        x = self.x.reshape(-1, self.x.shape[-1])
        token = self.token
        if token is None:
            token = np.arange(len(x)) * (shape[0] * shape[1]) // len(x)
        return Activations(self.path, x, _as_rows(grad), self.expert, first + token)

    def _by_head(self, first: int, grad: mx.array | None) -> Activations:
        """The rows of all heads, one head after the other. Heads may share their input."""
        heads = self.shape[1]
        x = mx.broadcast_to(self.x, (*self.shape[:-1], self.x.shape[-1]))
        x = x.swapaxes(0, 1).reshape(-1, self.x.shape[-1])
        grad = None if grad is None else grad.swapaxes(0, 1)

        tokens = len(x) // heads
        token = first + np.tile(np.arange(tokens), heads)
        return Activations(self.path, x, _as_rows(grad), np.repeat(np.arange(heads), tokens), token)


def _as_rows(grad: mx.array | None) -> mx.array | None:
    return None if grad is None else grad.reshape(-1, grad.shape[-1]).astype(mx.float32)


@contextmanager
def watched(
    calls: list[LayerCall], names: dict[int, str], tap: Tap | None = None
) -> Iterator[None]:
    """Record the calls of layers, and add taps to their outputs.

    Args:
        calls: receives them.
        names: paths of the layers to watch, by the id of the module.
        tap: what outputs go through (inputs are recorded without gradient then).
    """
    if not names:
        yield
        return
    routes: list[np.ndarray] = []
    as_float: dict[int, tuple[mx.array, mx.array]] = {}

    def in_float32(x: mx.array) -> mx.array:
        """In float32, once however many layers read it: all stay until the block is done."""
        if id(x) not in as_float:  # the key's array is held too, so that its id stays its own
            exact = x if tap is None else mx.stop_gradient(x)
            as_float[id(x)] = x, exact.astype(mx.float32)
        return as_float[id(x)][1]

    def record(layer: nn.Module, out: mx.array, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        path = names.get(id(layer))
        if path is None:
            return out
        read = in_float32(x)
        if isinstance(layer, EXPERTS):
            route = routes[-1] if routes else None
            rows, expert, token = _expert_rows(read, np.asarray(args[0]), route, **kwargs)
            call = LayerCall(path, rows, out.shape, out.dtype, expert, token)
        else:
            call = LayerCall(path, read, out.shape, out.dtype, heads=isinstance(layer, HEADS))
        calls.append(call)
        return out if tap is None else tap(len(calls) - 1, out)

    with (
        patching.routing_seen(lambda _, indices: routes.append(np.asarray(indices))),
        patching.outputs_changed(KINDS, record),
    ):
        yield


@contextmanager
def reading() -> Iterator[Callable[..., Activations]]:
    """Gives a function that tells what a layer reads, from the arguments of its call.

    `function(path, layer, x, *args, **kwargs)` is called before the layer is, in the order of the
    model, and once for all windows; x is (windows, tokens, ...).
    """
    routes: list[np.ndarray] = []

    def reads(path: str, layer: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Activations:
        exact = x.astype(mx.float32)
        if isinstance(layer, EXPERTS):
            route = routes[-1] if routes else None
            rows, expert, token = _expert_rows(exact, np.asarray(args[0]), route, **kwargs)
            mx.eval(rows)
            return Activations(path, rows, None, expert, token)
        rows = exact.reshape(-1, x.shape[-1])
        mx.eval(rows)
        return Activations(path, rows, None, None, np.arange(len(rows)))

    with patching.routing_seen(lambda _, indices: routes.append(np.asarray(indices))):
        yield reads


def _expert_rows(
    x: mx.array, chosen: np.ndarray, route: np.ndarray | None, sorted_indices: bool = False
) -> tuple[mx.array, np.ndarray, np.ndarray]:
    """An expert layer's rows: inputs (rows, inputs), the expert and the token of each.

    mlx-lm sorts the rows of many tokens by expert; which token each came from follows from the
    routing before.
    """
    lead, rows, expert = rows_and_experts(x, chosen)
    if not sorted_indices or route is None:
        return rows, expert, np.arange(len(expert)) // lead[-1]
    order = np.asarray(mx.argsort(mx.array(route).flatten()))
    return rows, expert, order // route.shape[-1]
