"""Walks through a model block by block: forward with what each layer read, backward with what the output minds.

No family's code is copied. The stock model runs with its blocks replaced for a moment: those already done return what
they returned, the next one hands its arguments over. Gradients with respect to a layer's output come from a "tap", a
zero added to it; the gradient of a weight is never made.

A model's blocks must form a chain (each takes the output of the one before, and nothing else of its size); a model
that is built otherwise is refused with `NoChain`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from .cpu import GroupedSwitchLinear
from .runner import LOGITS, Runner, returning, trunk_output, trunk_output_from, wrapped, wrapped_all

LINEAR = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, GroupedSwitchLinear, QuantizedSwitchLinear)
HEADS = (MultiLinear, QuantizedMultiLinear)
KINDS = (*LINEAR, *EXPERTS, *HEADS)


class NoChain(Exception):
    """The model's blocks don't form a chain, or something in them has no gradient."""


@dataclass(frozen=True)
class Rows:
    """What one layer read in some windows, a row for each token (and for each expert or head that read it).

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


@dataclass
class Step:
    """One block with its arguments for all windows."""

    index: int
    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Visit = Callable[[Rows], None]


class _Reached(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = args, kwargs


def walk(runner: Runner, tokens: np.ndarray) -> Generator[Step, Any, None]:
    """Yield each block with its arguments; send back what it returned (`run` computes that).

    Raises:
        NoChain: a block takes anything else than the output of the one before.
    """
    out: Any = None
    for index, block in enumerate(runner.trunk[runner.blocks]):
        args, kwargs = _arguments(runner, tokens, index, out)
        large = [a for a in (*args, *kwargs.values()) if _is_large(a, len(tokens))]
        if len(large) != 1 or not _is_large(args[0], len(tokens)) or (index and args[0] is not out):
            raise NoChain(f"block {index} takes more than the output of the one before")
        out = yield Step(index, block, args, kwargs)


def _arguments(runner: Runner, tokens: np.ndarray, index: int, out: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the block of this index is called with, where those before it return `out`."""
    blocks = list(runner.trunk[runner.blocks])
    numbers = {id(block): i for i, block in enumerate(blocks)}

    def stub(call: Any) -> Any:
        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in numbers:
                return call(self, *args, **kwargs)
            if numbers[id(self)] == index:
                raise _Reached(args, kwargs)
            return out

        return replaced

    with wrapped_all({type(block) for block in blocks}, stub):
        try:
            trunk_output(runner, mx.array(tokens))
        except _Reached as reached:
            return reached.call
    raise NoChain("a block is never called")


def _is_large(value: Any, windows: int) -> bool:
    """Whether an argument is of the size of the hidden state (not a mask, a cache or a number)."""
    if isinstance(value, (tuple, list)):
        return any(_is_large(item, windows) for item in value)
    if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
        return False
    return value.ndim > 2 and value.shape[0] == windows > 1


def run(step: Step, batch: int, visit: Visit | None = None, names: dict[int, str] | None = None) -> mx.array:
    """A block's output for all windows, `batch` at once.

    Args:
        step: from `walk`; its weights are here (runner.load_block).
        batch: windows at once.
        visit: called with what each of its layers reads.
        names: paths of the layers to visit, by the id of the module.
    """
    parts = []
    for start in range(0, len(step.args[0]), batch):
        seen: list[_Seen] = []
        with _watched(seen, names or {}):
            out = step.block(step.args[0][start : start + batch], *step.args[1:], **step.kwargs)
        if not isinstance(out, mx.array):
            raise NoChain(f"block {step.index} returns more than one array")
        mx.eval(out, [s.x for s in seen])
        if visit is not None:
            for s in seen:
                visit(s.rows(start, out.shape[:2], None))
        parts.append(out)
    return mx.concatenate(parts)


def pull_back(step: Step, grad: mx.array, batch: int, visit: Visit, names: dict[int, str]) -> mx.array:
    """The gradient at a block's input from that at its output, for all windows.

    Args:
        step: from `walk`; its weights are here.
        grad: float32, of the output's shape.
        batch, visit, names: as in `run`; rows come with gradients.
    """

    def block(h: mx.array) -> mx.array:
        out: mx.array = step.block(h, *step.args[1:], **step.kwargs)
        return out

    parts = []
    for start in range(0, len(grad), batch):
        h, cotangent = step.args[0][start : start + batch], grad[start : start + batch]
        parts.append(_with_taps(block, h, cotangent, names, start, h.shape[:2], visit))
        mx.clear_cache()
    return mx.concatenate(parts)


def _with_taps(
    function: Callable[[mx.array], mx.array],
    h: mx.array,
    cotangent: mx.array | None,
    names: dict[int, str],
    window: int,
    shape: tuple[int, ...],
    visit: Visit,
) -> mx.array:
    """The gradient at `h`, after every layer's rows were visited. Without a cotangent the function is a loss."""
    shapes: list[_Seen] = []
    with _watched(shapes, names):
        function(h)
    taps = [mx.zeros(s.shape, s.dtype) for s in shapes]
    seen: list[_Seen] = []

    def tapped(h: mx.array, *zeros: mx.array) -> mx.array:
        seen.clear()
        with _watched(seen, names, zeros):
            return function(h)

    try:
        if cotangent is None:
            _, grads = mx.vjp(tapped, [h, *taps], [mx.array(1.0)])
        else:
            _, grads = mx.vjp(tapped, [h, *taps], [cotangent.astype(h.dtype)])
        mx.eval(grads, [s.x for s in seen])
    except ValueError as error:  # an operation without a gradient
        raise NoChain(str(error).splitlines()[0]) from error
    for s, g in zip(seen, grads[1:], strict=True):
        visit(s.rows(window, shape, g))
    out: mx.array = grads[0]
    return out


def from_logits(
    runner: Runner, tokens: np.ndarray, hidden: mx.array, batch: int, key: mx.array, visit: Visit, names: dict[int, str]
) -> mx.array:
    """The gradient of the negative log-likelihood, summed over tokens, at the output of the last block.

    The label of each token is drawn from the model's own prediction, so that the gradients' second moment is the Fisher
    information.

    Args:
        hidden: (windows, tokens, hidden), the last block's output.
        key: for the labels.
        visit, names: for the layers after the blocks (the head).
    """
    grads = []
    for start in range(0, len(tokens), batch):
        part, h = mx.array(tokens[start : start + batch]), hidden[start : start + batch]
        key, draw = mx.random.split(key)
        after = partial(trunk_output_from, runner, part)
        top = _head_gradient(runner, part, after(h), start * h.shape[1], draw, visit, names)
        _, (grad,) = mx.vjp(after, [h], [top])
        mx.eval(grad)
        grads.append(grad)
        mx.clear_cache()
    return mx.concatenate(grads)


def _head_gradient(
    runner: Runner, tokens: mx.array, top: mx.array, first: int, key: mx.array, visit: Visit, names: dict[int, str]
) -> mx.array:
    """The gradient at the trunk's output of some windows, a few positions at a time; `first` is their first token."""
    length, column, step = top.shape[1], 0, 1
    pieces = []
    while column < length:
        columns = slice(column, min(column + step, length))
        key, draw = mx.random.split(key)
        loss = _loss(runner, tokens[:, columns], draw)
        wide = columns.stop - columns.start

        def moved(rows: Rows, start: int = column, wide: int = wide) -> None:
            """Rows are counted within the piece, window by window: count them within all windows."""
            window, offset = np.divmod(rows.token, wide)
            visit(replace(rows, token=first + window * length + start + offset))

        pieces.append(_with_taps(loss, top[:, columns], None, names, 0, (len(tokens), wide), moved))
        column = columns.stop
        step = max(1, LOGITS // (len(tokens) * _vocabulary(runner, tokens, top)))
    return mx.concatenate(pieces, axis=1)


def _logits(runner: Runner, tokens: mx.array, top: mx.array) -> mx.array:
    with wrapped(type(runner.trunk), returning(runner.trunk, top)):
        logits: mx.array = runner.model(tokens).astype(mx.float32)
    return logits


def _vocabulary(runner: Runner, tokens: mx.array, top: mx.array) -> int:
    """The width of the logits (nothing is computed)."""
    return int(_logits(runner, tokens[:1, :1], top[:1, :1]).shape[-1])


def _loss(runner: Runner, tokens: mx.array, key: mx.array) -> Callable[[mx.array], mx.array]:
    """The negative log-likelihood of labels drawn from the model, as a function of the trunk's output."""

    def loss(top: mx.array) -> mx.array:
        logits = _logits(runner, tokens, top)
        labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
        chosen = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return mx.sum(mx.logsumexp(logits, axis=-1) - chosen)

    return loss


def to_embedding(
    runner: Runner, tokens: np.ndarray, first: Step, grad: mx.array, batch: int, names: dict[int, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The gradient at the output of the embedding: its path, and |gradient|^2 of each token, float64.

    Args:
        first: the first block's step.
        grad: the gradient at its input.
    """
    for start in range(0, len(tokens), batch):
        found: list[nn.Module] = []
        before = _before_blocks(runner, mx.array(tokens[start : start + batch]), first, found)
        part = grad[start : start + batch]
        _, (back,) = mx.vjp(before, [mx.zeros(part.shape, part.dtype)], [part])
        norms = np.asarray(mx.sum(mx.square(back.astype(mx.float32)), axis=-1)).astype(np.float64)
        if len(set(map(id, found))) != 1:
            raise NoChain("the model has more than one embedding")
        yield names[id(found[0])], norms.reshape(-1)


def _before_blocks(
    runner: Runner, tokens: mx.array, first: Step, found: list[nn.Module]
) -> Callable[[mx.array], mx.array]:
    """From a tap on the embedding's output to the first block's argument; `found` receives the embedding."""

    def stub(call: Any) -> Any:
        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self is first.block:
                raise _Reached(args, kwargs)
            return call(self, *args, **kwargs)

        return replaced

    def before(tap: mx.array) -> mx.array:
        def add(call: Any) -> Any:
            def replaced(self: nn.Module, ids: mx.array) -> Any:
                found.append(self)
                return call(self, ids) + tap

            return replaced

        with wrapped(type(first.block), stub), wrapped_all({nn.Embedding, nn.QuantizedEmbedding}, add):
            try:
                trunk_output(runner, tokens)
            except _Reached as reached:
                out: mx.array = reached.call[0][0]
                return out
        raise NoChain("the first block is never called")

    return before


@dataclass
class _Seen:
    """One call of a layer: its input, its output's shape, and for experts which one each row went to."""

    path: str
    x: mx.array
    shape: tuple[int, ...]
    dtype: mx.Dtype
    part: np.ndarray | None = None
    token: np.ndarray | None = None
    heads: bool = False

    def rows(self, window: int, shape: tuple[int, ...], grad: mx.array | None) -> Rows:
        """As rows, tokens counted from the first of all windows. `shape` is (windows, tokens) of this batch."""
        first = window * shape[1]
        if self.heads:  # (windows, heads, tokens, size): heads first
            count = self.shape[1]
            whole = mx.broadcast_to(self.x, (*self.shape[:-1], self.x.shape[-1]))  # heads may share their input
            x = whole.swapaxes(0, 1).reshape(-1, self.x.shape[-1])
            back = None if grad is None else grad.swapaxes(0, 1).reshape(-1, grad.shape[-1])
            each = np.tile(np.arange(len(x) // count), count)
            return Rows(self.path, _f32(x), _f32(back), np.repeat(np.arange(count), len(x) // count), first + each)
        x = self.x.reshape(-1, self.x.shape[-1])
        back = None if grad is None else grad.reshape(-1, grad.shape[-1])
        token = self.token
        if token is None:
            token = np.arange(len(x)) * (shape[0] * shape[1]) // len(x)
        return Rows(self.path, _f32(x), _f32(back), self.part, first + token)


def _f32(array: Any) -> Any:
    return None if array is None else array.astype(mx.float32)


@contextmanager
def _watched(seen: list[_Seen], names: dict[int, str], taps: tuple[mx.array, ...] | None = None) -> Iterator[None]:
    """Record the calls of the named layers, and add the taps to their outputs in the order of the calls."""
    routes: list[np.ndarray] = []

    def route(call: Any) -> Any:
        def replaced(self: nn.Module, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> Any:
            routes.append(np.asarray(indices))
            return call(self, x, indices, *args, **kwargs)

        return replaced

    def record(call: Any) -> Any:
        def replaced(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            out = call(self, x, *args, **kwargs)
            path = names.get(id(self))
            if path is None:
                return out
            kept = x if taps is None else mx.stop_gradient(x)
            if isinstance(self, EXPERTS):
                one = _expert_rows(kept, np.asarray(args[0]), routes[-1] if routes else None, **kwargs)
                seen.append(_Seen(path, one[0], out.shape, out.dtype, one[1], one[2]))
            else:
                seen.append(_Seen(path, kept, out.shape, out.dtype, heads=isinstance(self, HEADS)))
            return out if taps is None else out + taps[len(seen) - 1]

        return replaced

    with wrapped_all({SwitchGLU, SwitchMLP}, route), wrapped_all(set(KINDS), record), ExitStack() as tied:
        for kind in (nn.Embedding, nn.QuantizedEmbedding):
            tied.enter_context(wrapped(kind, record, "as_linear"))
        yield


def _expert_rows(
    x: mx.array, chosen: np.ndarray, route: np.ndarray | None, sorted_indices: bool = False
) -> tuple[mx.array, np.ndarray, np.ndarray]:
    """An expert layer's rows: inputs (rows, inputs), the expert and the token of each.

    mlx-lm sorts the rows of many tokens by expert; which token each came from follows from the routing before.
    """
    lead = np.broadcast_shapes(chosen.shape, x.shape[:-2])
    rows = mx.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, x.shape[-1])
    expert = np.broadcast_to(chosen, lead).reshape(-1)
    if not sorted_indices or route is None:
        return rows, expert, np.arange(len(expert)) // lead[-1]
    order = np.asarray(mx.argsort(mx.array(route).flatten()))
    return rows, expert, order // route.shape[-1]
