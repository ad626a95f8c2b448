"""Walks through a model block by block: forward with what each layer read, backward with what the
output minds.

No family's code is copied. The stock model runs with its blocks replaced for a moment: those
already done return what they returned, the next one hands its arguments over.

A model's blocks must form a chain (each takes the output of the one before, and nothing else of its
size); a model that is built otherwise is refused with `NoChain`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .fast_math import fast_math
from .patching import wrapped, wrapped_all
from .runner import (
    LOGITS,
    Runner,
    layer_names,
    load_block,
    logits_of,
    release_block,
    trunk_output,
    trunk_output_from,
)
from .taps import Rows, Seen, Visit, watched


class NoChain(Exception):
    """The model's blocks don't form a chain, or something in them has no gradient."""


@dataclass
class Step:
    """One block with its arguments for all windows."""

    index: int
    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = args, kwargs


def walk(runner: Runner, tokens: np.ndarray) -> Generator[Step, Any, None]:
    """Yield each block with its arguments; send back what it returned (`run` computes that).

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).

    Raises:
        NoChain: a block takes anything else than the output of the one before, or takes it by
            keyword.
    """
    out: Any = None
    for index, block in enumerate(runner.trunk[runner.blocks]):
        args, kwargs = _arguments(runner, tokens, index, out)
        large = [a for a in (*args, *kwargs.values()) if _is_large(a, len(tokens))]
        if (
            len(large) != 1
            or not args
            or not _is_large(args[0], len(tokens))
            or (index and args[0] is not out)
        ):
            raise NoChain(f"block {index} takes something else than the output of the one before")
        out = yield Step(index, block, args, kwargs)


def forward_blocks(
    runner: Runner,
    tokens: np.ndarray,
    batch: int,
    wanted: Collection[str] = (),
    first: int = 0,
    known: Callable[[int], mx.array | None] = lambda _: None,
) -> Generator[tuple[Step, mx.array, dict[str, list[Rows]]]]:
    """Each block with its output for all windows, and what its layers read; its weights are here
    until the next.

    Args:
        runner, tokens: as for `walk`.
        batch: windows at once.
        wanted: paths of the layers whose rows are asked for.
        first: the block from which on they are.
        known: a block's output where an earlier run left it; that block isn't run again.
    """
    blocks = walk(runner, tokens)
    step = next(blocks)
    while True:
        rows: dict[str, list[Rows]] = {}

        def visit(seen: Rows, rows: dict[str, list[Rows]] = rows) -> None:
            rows.setdefault(seen.path, []).append(seen)

        done = known(step.index)
        if done is None:
            load_block(runner, step.block)
            out = run(step, batch, visit, names_of(runner, wanted if step.index >= first else ()))
        else:
            out = done
        yield step, out, rows
        release_block(runner, step.block)
        try:
            step = blocks.send(out)
        except StopIteration:
            return


def names_of(runner: Runner, wanted: Collection[str]) -> dict[int, str]:
    """Paths of these layers by the id of the module (which changes when its block is loaded)."""
    return (
        {key: path for key, path in layer_names(runner).items() if path in wanted} if wanted else {}
    )


def first_input(runner: Runner, tokens: np.ndarray) -> mx.array:
    """What the first block reads, (windows, tokens, hidden), with the embedding that the model has
    now.
    """
    hidden: mx.array = _arguments(runner, tokens, 0, None)[0][0]
    mx.eval(hidden)
    return hidden


def _arguments(
    runner: Runner, tokens: np.ndarray, index: int, out: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def call_block(step: Step, hidden: mx.array) -> Any:
    """What a block returns for some windows of its input; its weights are here."""
    with fast_math(step.block):
        return step.block(hidden, *step.args[1:], **step.kwargs)


def run(
    step: Step, batch: int, visit: Visit | None = None, names: dict[int, str] | None = None
) -> mx.array:
    """A block's output for all windows, `batch` at once.

    Args:
        step: from `walk`; its weights are here (runner.load_block).
        batch: windows at once.
        visit: called with what each of its layers reads.
        names: paths of the layers to visit, by the id of the module.
    """
    parts = []
    for start in range(0, len(step.args[0]), batch):
        seen: list[Seen] = []
        with watched(seen, names or {}):
            out = call_block(step, step.args[0][start : start + batch])
        if not isinstance(out, mx.array):
            raise NoChain(f"block {step.index} returns more than one array")
        mx.eval(out, [s.x for s in seen])
        if visit is not None:
            for s in seen:
                visit(s.rows(start, out.shape[:2], None))
        parts.append(out)
    return mx.concatenate(parts)


def pull_back(
    step: Step, grad: mx.array, batch: int, visit: Visit, names: dict[int, str]
) -> mx.array:
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
    """The gradient at `h`, after every layer's rows were visited. Without a cotangent the function
    is a loss.
    """
    shapes: list[Seen] = []
    with watched(shapes, names):
        function(h)
    taps = [mx.zeros(s.shape, s.dtype) for s in shapes]
    seen: list[Seen] = []

    def tapped(h: mx.array, *zeros: mx.array) -> mx.array:
        seen.clear()
        with watched(seen, names, zeros):
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
    runner: Runner,
    tokens: np.ndarray,
    hidden: mx.array,
    batch: int,
    key: mx.array,
    visit: Visit,
    names: dict[int, str],
) -> mx.array:
    """The gradient of the negative log-likelihood, summed over tokens, at the output of the last
    block.

    The label of each token is drawn from the model's own prediction, so that the gradients' second
    moment is the Fisher information.

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        hidden: (windows, tokens, hidden), the last block's output.
        batch: windows at once.
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
    runner: Runner,
    tokens: mx.array,
    top: mx.array,
    first: int,
    key: mx.array,
    visit: Visit,
    names: dict[int, str],
) -> mx.array:
    """The gradient at the trunk's output of some windows, a few positions at a time; `first` is
    their first token.
    """
    length, column, step = top.shape[1], 0, 1
    pieces = []
    while column < length:
        columns = slice(column, min(column + step, length))
        key, draw = mx.random.split(key)
        loss = _loss(runner, tokens[:, columns], draw)
        wide = columns.stop - columns.start

        def moved(rows: Rows, start: int = column, wide: int = wide) -> None:
            """Rows are counted within the piece, by window: count them within all windows."""
            window, offset = np.divmod(rows.token, wide)
            visit(replace(rows, token=first + window * length + start + offset))

        pieces.append(_with_taps(loss, top[:, columns], None, names, 0, (len(tokens), wide), moved))
        column = columns.stop
        step = max(1, LOGITS // (len(tokens) * _vocabulary(runner, tokens, top)))
    return mx.concatenate(pieces, axis=1)


def _vocabulary(runner: Runner, tokens: mx.array, top: mx.array) -> int:
    """The width of the logits (nothing is computed)."""
    return int(logits_of(runner, tokens[:1, :1], top[:1, :1]).shape[-1])


def _loss(runner: Runner, tokens: mx.array, key: mx.array) -> Callable[[mx.array], mx.array]:
    """The negative log-likelihood of labels drawn from the model, as a function of the trunk's
    output.
    """

    def loss(top: mx.array) -> mx.array:
        logits = logits_of(runner, tokens, top)
        labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
        chosen = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return mx.sum(mx.logsumexp(logits, axis=-1) - chosen)

    return loss


def to_embedding(
    runner: Runner,
    tokens: np.ndarray,
    first: Step,
    grad: mx.array,
    batch: int,
    names: dict[int, str],
) -> Iterator[tuple[str, mx.array]]:
    """The gradient at the output of the embedding: its path, and the gradients, float32 (tokens,
    hidden).

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        first: the first block's step.
        grad: the gradient at its input, (windows, tokens, hidden).
        batch: windows at once.
        names: of modules, by id.
    """
    for start in range(0, len(tokens), batch):
        found: list[nn.Module] = []
        before = _before_blocks(runner, mx.array(tokens[start : start + batch]), first, found)
        part = grad[start : start + batch]
        _, (back,) = mx.vjp(before, [mx.zeros(part.shape, part.dtype)], [part])
        if len(set(map(id, found))) != 1:
            raise NoChain("the model has more than one embedding")
        yield names[id(found[0])], back.astype(mx.float32).reshape(-1, back.shape[-1])


def _before_blocks(
    runner: Runner, tokens: mx.array, first: Step, found: list[nn.Module]
) -> Callable[[mx.array], mx.array]:
    """From a tap on the embedding's output to the first block's argument; `found` receives the
    embedding.
    """

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

        with (
            wrapped(type(first.block), stub),
            wrapped_all({nn.Embedding, nn.QuantizedEmbedding}, add),
        ):
            try:
                trunk_output(runner, tokens)
            except _Reached as reached:
                out: mx.array = reached.call[0][0]
                return out
        raise NoChain("the first block is never called")

    return before
