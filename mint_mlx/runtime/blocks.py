"""The engine that runs a model's blocks one at a time, forward and backward.

Evaluation, sensitivity, error feedback and learning all run blocks through this file: a block's
weights are read where the model is larger than memory, the block runs on all windows, a few at
once, and its weights are dropped.

No family's code is copied: the stock model tells what each block is called with (patching.py).
Evaluation runs whatever blocks take and return (`streamed_trunk_output`). For everything else they
must form a chain, in which each takes the output of the one before and nothing else of its size; a
model that is built otherwise is refused with `NoChain`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.errors import MintError
from . import patching
from .fast_math import fast_math
from .runner import Runner, layer_names, load_block, release_block, trunk_output
from .taps import Activations, LayerCall, Visit, watched


class NoChain(Exception):
    """The model's blocks don't form a chain, or something in them has no gradient."""


@dataclass(frozen=True)
class Step:
    """One block with its arguments for all windows.

    Attributes:
        index: of the block.
        block: the module.
        windows: how many.
        args, kwargs: of the call; the first is the hidden state (windows, tokens, hidden).
    """

    index: int
    block: nn.Module
    windows: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_input(self, hidden: mx.array | None) -> Step:
        """The same call with another hidden state, or without one until it is read from disk."""
        return replace(self, args=(hidden, *self.args[1:]))

    def arguments(self, start: int, count: int) -> patching.Arguments:
        """The arguments of some of the windows."""

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(cut, value))
            by_window = (
                isinstance(value, mx.array) and value.ndim > 2 and value.shape[0] == self.windows
            )
            return value[start : start + count] if by_window else value

        return tuple(map(cut, self.args)), {name: cut(v) for name, v in self.kwargs.items()}


def forward_blocks(
    runner: Runner,
    tokens: np.ndarray,
    batch: int,
    wanted: Collection[str] = (),
    first: int = 0,
    known: Callable[[int], mx.array | None] = lambda _: None,
) -> Iterator[tuple[Step, mx.array, dict[str, list[Activations]]]]:
    """Each block with its output for all windows, and what its layers read.

    Its weights are loaded until the next block is asked for.

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        batch: windows at once.
        wanted: paths of the layers whose activations are collected.
        first: the block from which on they are.
        known: gives a block's output where an earlier run stored it; that block isn't run again.

    Raises:
        NoChain: a block takes anything else than the output of the one before, or takes it by
            keyword, or returns anything else than one array.
    """
    out: mx.array | None = None
    for index in range(len(runner.blocks)):
        step = _step(runner, tokens, index, out)
        activations: dict[str, list[Activations]] = {}

        def visit(
            seen: Activations, activations: dict[str, list[Activations]] = activations
        ) -> None:
            activations.setdefault(seen.path, []).append(seen)

        out = known(index)
        with loaded(runner, step.block) if out is None else nullcontext():
            if out is None:
                names = names_of(runner, wanted if index >= first else ())
                out = run(step, batch, visit, names)
            if not isinstance(out, mx.array):
                raise NoChain(f"block {index} returns more than one array")
            yield step, out, activations


def backward_blocks(
    runner: Runner,
    steps: Iterable[Step],
    grad: mx.array,
    batch: int,
    visit: Visit,
    wanted: Collection[str],
) -> Iterator[tuple[Step, mx.array, mx.array]]:
    """Each block with the gradients at its output and at its input, for all windows.

    Args:
        runner: the loaded model.
        steps: of `forward_blocks`, the last first, with their hidden states.
        grad: float32, the gradient at the output of the first of these.
        batch: windows at once.
        visit: called with what each wanted layer reads, and the gradient at its output.
        wanted: paths of these layers.

    Raises:
        NoChain: an operation has no gradient.
    """
    for step in steps:
        with loaded(runner, step.block):
            below = pull_back(step, grad, batch, visit, names_of(runner, wanted))
        yield step, grad, below
        grad = below


def streamed_trunk_output(runner: Runner, tokens: mx.array, batch: int) -> mx.array:
    """As `trunk_output` for all windows, each block read when it is called and dropped after it.

    Blocks need not form a chain: they may take and return any arrays and tuples of arrays.

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        batch: windows at once, of a block; what lies between blocks runs on all of them.

    Raises:
        MintError: a block is called twice, or with an object that it may change (a cache).
    """
    waiting = {id(block): index for index, block in enumerate(runner.blocks)}

    def run_once(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        index = waiting.pop(id(block), None)
        if index is None or not all(map(_is_plain, (*args, *kwargs.values()))):
            raise MintError(
                f"{runner.folder.name} keeps state between its blocks or calls one twice, so "
                "it cannot be run block by block: it needs a machine with memory for the "
                "whole model"
            )
        with loaded(runner, block):
            return run(Step(index, block, len(tokens), args, kwargs), batch)

    with patching.blocks_run_by(runner.blocks, run_once):
        hidden = trunk_output(runner, tokens)
        mx.eval(hidden)
    return hidden


@contextmanager
def loaded(runner: Runner, block: nn.Module) -> Iterator[None]:
    """A block with its weights, which are dropped afterwards where the model is streamed."""
    load_block(runner, block)
    yield
    release_block(runner, block)


def run(
    step: Step, batch: int, visit: Visit | None = None, names: dict[int, str] | None = None
) -> Any:
    """What a block, whose weights are loaded, returns for all windows: an array, or a tuple.

    Args:
        step: the block and its arguments.
        batch: windows at once.
        visit: called with what each of the named layers reads.
        names: their paths, by the id of the module.
    """
    outputs = []
    for start in range(0, step.windows, batch):
        args, kwargs = step.arguments(start, batch)
        calls: list[LayerCall] = []
        with fast_math(step.block), watched(calls, names or {}):
            out = step.block(*args, **kwargs)
        mx.eval(out, [call.x for call in calls])

        if visit is not None:
            for call in calls:
                visit(call.activations(start, args[0].shape[:2], None))
        outputs.append(out)
    return _joined(outputs)


def call_block(step: Step, hidden: mx.array) -> mx.array:
    """What a block of a chain, whose weights are loaded, returns for any hidden states."""
    with fast_math(step.block):
        return step.block(hidden, *step.args[1:], **step.kwargs)


def pull_back(
    step: Step, grad: mx.array, batch: int, visit: Visit, names: dict[int, str]
) -> mx.array:
    """The gradient at a block's input from that at its output, for all windows.

    Args:
        step: a block of a chain, whose weights are loaded.
        grad: float32, of the output's shape.
        batch: windows at once.
        visit: called with what each of the named layers reads and the gradient at its output.
        names: their paths, by the id of the module.

    Raises:
        NoChain: an operation has no gradient.
    """
    below = []
    for start in range(0, step.windows, batch):
        (hidden, *args), kwargs = step.arguments(start, batch)

        def block(hidden: mx.array, args: Any = args, kwargs: Any = kwargs) -> mx.array:
            with fast_math(step.block):
                return step.block(hidden, *args, **kwargs)

        cotangent = grad[start : start + batch].astype(hidden.dtype)
        to_hidden, calls = tapped_gradient(block, hidden, cotangent, names)
        for call, to_output in calls:
            visit(call.activations(start, hidden.shape[:2], to_output))
        below.append(to_hidden)
        mx.clear_cache()
    return mx.concatenate(below)


def tapped_gradient(
    function: Callable[[mx.array], mx.array],
    at: mx.array,
    cotangent: mx.array,
    names: dict[int, str],
) -> tuple[mx.array, list[tuple[LayerCall, mx.array]]]:
    """A function's gradient at its argument, and at the output of every layer that it calls.

    Args:
        function: runs layers.
        at: its argument.
        cotangent: of the function's output's shape.
        names: paths of the layers, by the id of the module.

    Raises:
        NoChain: an operation has no gradient.
    """
    calls: list[LayerCall] = []
    to_outputs: dict[int, mx.array] = {}

    def tap(number: int, out: mx.array) -> mx.array:
        @mx.custom_function
        def passed_on(out: mx.array) -> mx.array:
            return out

        @passed_on.vjp
        def _(out: mx.array, grad: mx.array, _: mx.array) -> mx.array:
            to_outputs[number] = grad
            return grad

        return cast(mx.array, passed_on(out))

    def tapped(at: mx.array) -> mx.array:
        with watched(calls, names, tap):
            return function(at)

    try:
        _, (gradient,) = mx.vjp(tapped, [at], [cotangent])
        # An output that nothing depends on has no gradient.
        grads = [
            to_outputs[i] if i in to_outputs else mx.zeros(call.shape, call.dtype)
            for i, call in enumerate(calls)
        ]
        mx.eval(gradient, grads, [call.x for call in calls])
    except ValueError as error:  # an operation without a gradient
        raise NoChain(str(error).splitlines()[0]) from error
    return gradient, list(zip(calls, grads, strict=True))


def names_of(runner: Runner, wanted: Collection[str]) -> dict[int, str]:
    """Paths of these layers by the id of the module (which changes when its block is loaded)."""
    if not wanted:
        return {}
    return {key: path for key, path in layer_names(runner).items() if path in wanted}


def first_input(runner: Runner, tokens: np.ndarray) -> mx.array:
    """What the first block reads, (windows, tokens, hidden), with the embedding of this moment."""
    (hidden, *_), _ = _arguments(runner, tokens, 0, None)
    mx.eval(hidden)
    return hidden


def _step(runner: Runner, tokens: np.ndarray, index: int, before: mx.array | None) -> Step:
    """A block of a chain with its arguments; `before` is the output of the one before.

    Raises:
        NoChain: see `forward_blocks`.
    """
    args, kwargs = _arguments(runner, tokens, index, before)
    hidden_states = [a for a in (*args, *kwargs.values()) if _is_large(a, len(tokens))]
    is_chained = (
        len(hidden_states) == 1
        and len(args) > 0
        and _is_large(args[0], len(tokens))
        and (index == 0 or args[0] is before)
    )
    if not is_chained:
        raise NoChain(f"block {index} takes something other than the output of the block before")
    return Step(index, runner.blocks[index], len(tokens), args, kwargs)


def _arguments(
    runner: Runner, tokens: np.ndarray, index: int, before: mx.array | None
) -> patching.Arguments:
    """What a block is called with where those before it return `before`."""
    block = runner.blocks[index]
    others = [other for other in runner.blocks if other is not block]
    with patching.returning(others, before):
        try:
            return patching.arguments_of(block, lambda: trunk_output(runner, mx.array(tokens)))
        except patching.NotCalled:
            raise NoChain("a block is never called") from None


def _is_large(value: Any, windows: int) -> bool:
    """Whether an argument is of the size of the hidden state (not a mask, a cache or a number)."""
    if isinstance(value, (tuple, list)):
        return any(_is_large(item, windows) for item in value)
    if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
        return False
    return value.ndim > 2 and value.shape[0] == windows > 1


def _is_plain(value: Any) -> bool:
    """Whether an argument is an array, a number or such, not an object that a block may change."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (mx.array, str, int, float))


def _joined(outputs: list[Any]) -> Any:
    """A block's outputs for all windows: arrays end to end, tuples item by item."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined([out[i] for out in outputs]) for i in range(len(first)))
    return mx.concatenate(outputs) if isinstance(first, mx.array) else first
