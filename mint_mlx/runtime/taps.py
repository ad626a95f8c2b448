"""What layers read while a model runs: rows for each layer, expert and token, and taps that
gradients are taken at.

A "tap" is a zero added to a layer's output: its gradient is the one with respect to that output,
and no weight's gradient is made for it. The stock model runs; its layers' `__call__` is wrapped for
a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from .cpu_ops import GroupedSwitchLinear, rows_and_experts
from .patching import wrapped, wrapped_all

LINEAR = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, GroupedSwitchLinear, QuantizedSwitchLinear)
HEADS = (MultiLinear, QuantizedMultiLinear)
KINDS = (*LINEAR, *EXPERTS, *HEADS)


@dataclass(frozen=True)
class Rows:
    """What one layer read in some windows, a row for each token (and for each expert or head that
    read it).

    Attributes:
        path: the layer.
        x: float32 (rows, inputs).
        grad: float32 (rows, outputs), where a backward pass is made.
        part: int (rows,), the expert or head of each row; None for a layer without.
        token: int (rows,), the token of each row, counted through all windows.
    """

    path: str
    x: mx.array
    grad: mx.array | None
    part: np.ndarray | None
    token: np.ndarray


Visit = Callable[[Rows], None]


@dataclass
class Seen:
    """One call of a layer: its input in float32, its output's shape, and for experts which one each
    row went to.
    """

    path: str
    x: mx.array
    shape: tuple[int, ...]
    dtype: mx.Dtype
    part: np.ndarray | None = None
    token: np.ndarray | None = None
    heads: bool = False

    def rows(self, window: int, shape: tuple[int, ...], grad: mx.array | None) -> Rows:
        """As rows, tokens counted from the first of all windows. `shape` is (windows, tokens) of
        this batch.
        """
        first = window * shape[1]
        if self.heads:  # (windows, heads, tokens, size): heads first
            count = self.shape[1]
            whole = mx.broadcast_to(
                self.x, (*self.shape[:-1], self.x.shape[-1])
            )  # heads may share their input
            x = whole.swapaxes(0, 1).reshape(-1, self.x.shape[-1])
            back = None if grad is None else grad.swapaxes(0, 1).reshape(-1, grad.shape[-1])
            each = np.tile(np.arange(len(x) // count), count)
            return Rows(
                self.path, x, _f32(back), np.repeat(np.arange(count), len(x) // count), first + each
            )
        x = self.x.reshape(-1, self.x.shape[-1])
        back = None if grad is None else grad.reshape(-1, grad.shape[-1])
        token = self.token
        if token is None:
            token = np.arange(len(x)) * (shape[0] * shape[1]) // len(x)
        return Rows(self.path, x, _f32(back), self.part, first + token)


def _f32(array: mx.array | None) -> mx.array | None:
    return None if array is None else array.astype(mx.float32)


@contextmanager
def watched(
    seen: list[Seen], names: dict[int, str], taps: tuple[mx.array, ...] | None = None
) -> Iterator[None]:
    """Record the calls of the named layers, and add the taps to their outputs in the order of the
    calls.
    """
    routes: list[np.ndarray] = []
    floats: dict[
        int, tuple[mx.array, mx.array]
    ] = {}  # by identity what was read, and the same in float32

    def cast(x: mx.array) -> mx.array:
        """In float32, once however many layers read it: all stay until the block is done."""
        if id(x) not in floats:
            floats[id(x)] = x, (x if taps is None else mx.stop_gradient(x)).astype(mx.float32)
        return floats[id(x)][1]

    def route(call: Any) -> Any:
        def replaced(
            self: nn.Module, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any
        ) -> Any:
            routes.append(np.asarray(indices))
            return call(self, x, indices, *args, **kwargs)

        return replaced

    def record(call: Any) -> Any:
        def replaced(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            out = call(self, x, *args, **kwargs)
            path = names.get(id(self))
            if path is None:
                return out
            kept = cast(x)
            if isinstance(self, EXPERTS):
                one = _expert_rows(
                    kept, np.asarray(args[0]), routes[-1] if routes else None, **kwargs
                )
                seen.append(Seen(path, one[0], out.shape, out.dtype, one[1], one[2]))
            else:
                seen.append(Seen(path, kept, out.shape, out.dtype, heads=isinstance(self, HEADS)))
            return out if taps is None else out + taps[len(seen) - 1]

        return replaced

    with (
        wrapped_all({SwitchGLU, SwitchMLP}, route),
        wrapped_all(set(KINDS), record),
        ExitStack() as tied,
    ):
        for kind in (nn.Embedding, nn.QuantizedEmbedding):
            tied.enter_context(wrapped(kind, record, "as_linear"))
        yield


def _expert_rows(
    x: mx.array, chosen: np.ndarray, route: np.ndarray | None, sorted_indices: bool = False
) -> tuple[mx.array, np.ndarray, np.ndarray]:
    """An expert layer's rows: inputs (rows, inputs), the expert and the token of each.

    mlx-lm sorts the rows of many tokens by expert; which token each came from follows from the
    routing before."""
    lead, rows, expert = rows_and_experts(x, chosen)
    if not sorted_indices or route is None:
        return rows, expert, np.arange(len(expert)) // lead[-1]
    order = np.asarray(mx.argsort(mx.array(route).flatten()))
    return rows, expert, order // route.shape[-1]
