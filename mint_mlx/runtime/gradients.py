"""Gradients outside the blocks: through the head and through the embedding.

From the model's own predictions to the last block's output, and from the first block's input to the
embedding's output; blocks.py has what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import patching
from .blocks import NoChain, tapped_gradient
from .draws import drawn_loss, uniform_numbers
from .runner import LOGITS, Runner, logits_of, trunk_output, trunk_output_from
from .taps import Visit


def from_logits(
    runner: Runner,
    tokens: np.ndarray,
    counted: np.ndarray,
    hidden: mx.array,
    batch: int,
    seed: int,
    visit: Visit,
    names: dict[int, str],
) -> mx.array:
    """The gradient of the negative log-likelihood, summed over tokens, at the last block's output.

    The label of each token is drawn from the model's own prediction, so that the gradients' second
    moment is the Fisher information.

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        counted: bool (windows, tokens), whether what is predicted after a token counts.
        hidden: (windows, tokens, hidden), the last block's output.
        batch: windows at once.
        seed: of the labels.
        visit: called with what each of the named layers (the head) reads, and its gradient.
        names: their paths, by the id of the module.

    Raises:
        NoChain: an operation has no gradient.
    """
    grads = []
    uniform = uniform_numbers("labels", seed, tokens.shape)
    for start in range(0, len(tokens), batch):
        some = slice(start, start + batch)
        some_tokens = mx.array(tokens[some])
        some_hidden = hidden[some]
        loss = partial(_loss, runner, some_tokens, uniform[some], counted[some])

        to_top = partial(trunk_output_from, runner, some_tokens)
        top = to_top(some_hidden)
        mx.eval(top)
        first_token = start * hidden.shape[1]
        width = max(1, LOGITS // (len(top) * _vocabulary(runner, some_tokens, top)))
        top_grad = _head_gradient(loss, top, width, first_token, visit, names)
        _, (grad,) = mx.vjp(to_top, [some_hidden], [top_grad])

        mx.eval(grad)
        grads.append(grad)
        mx.clear_cache()
    return mx.concatenate(grads)


def to_embedding(
    runner: Runner,
    tokens: np.ndarray,
    first_block: nn.Module,
    grad: mx.array,
    batch: int,
    names: dict[int, str],
) -> Iterator[tuple[str, mx.array]]:
    """The gradient at the output of the embedding: its path, and the gradients of some windows.

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        first_block: the module.
        grad: the gradient at its input, (windows, tokens, hidden).
        batch: windows at once.
        names: paths of layers, by the id of the module.

    Yields:
        The path and float32 (tokens, hidden).

    Raises:
        NoChain: the model has more than one embedding.
    """
    for start in range(0, len(tokens), batch):
        some_tokens = mx.array(tokens[start : start + batch])
        some_grad = grad[start : start + batch]
        called: set[int] = set()
        to_first_block = partial(_first_input_with_tap, runner, some_tokens, first_block, called)

        # The tap is a zero, whose gradient is the one at the embedding's output.
        _, (to_output,) = mx.vjp(
            to_first_block, [mx.zeros(some_grad.shape, some_grad.dtype)], [some_grad]
        )
        if len(called) != 1:
            raise NoChain("the model has more than one embedding")
        yield names[called.pop()], to_output.astype(mx.float32).reshape(-1, to_output.shape[-1])


def _head_gradient(
    loss: Callable[[slice, mx.array], mx.array],
    top: mx.array,
    width: int,
    first_token: int,
    visit: Visit,
    names: dict[int, str],
) -> mx.array:
    """The gradient at the trunk's output of some windows, a few positions at a time.

    Args:
        loss: of some positions, of the trunk's output there.
        top: (windows, tokens, hidden), the trunk's output.
        width: positions at a time.
        first_token: of these windows, counted through all.
        visit, names: as for `from_logits`.
    """
    length = top.shape[1]
    pieces = []
    for column in range(0, length, width):
        columns = slice(column, min(column + width, length))
        grad, calls = tapped_gradient(partial(loss, columns), top[:, columns], mx.array(1.0), names)

        for call, to_output in calls:
            activations = call.activations(0, grad.shape[:2], to_output)
            # Tokens are counted within these columns, by window: count them within all windows.
            window, offset = np.divmod(activations.token, grad.shape[1])
            token = first_token + window * length + column + offset
            visit(replace(activations, token=token))
        pieces.append(grad)
    return mx.concatenate(pieces, axis=1)


def _vocabulary(runner: Runner, tokens: mx.array, top: mx.array) -> int:
    """The width of the logits (nothing is computed)."""
    return int(logits_of(runner, tokens[:1, :1], top[:1, :1]).shape[-1])


def _loss(
    runner: Runner,
    tokens: mx.array,
    uniform: np.ndarray,
    counted: np.ndarray,
    columns: slice,
    top: mx.array,
) -> mx.array:
    """The negative log-likelihood of labels drawn from the model, of the trunk's output.

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        uniform: float64 (windows, tokens), which decide the labels.
        counted: bool (windows, tokens), whether what is predicted after a token counts.
        columns: the positions that are asked for.
        top: (windows, positions, hidden), the trunk's output there.
    """
    logits = logits_of(runner, tokens[:, columns], top)
    if not counted[:, columns].all():
        counts = mx.array(counted[:, columns])[..., None]
        logits = mx.where(counts, logits, mx.stop_gradient(logits))
    return drawn_loss(logits, uniform[:, columns])


def _first_input_with_tap(
    runner: Runner,
    tokens: mx.array,
    first_block: nn.Module,
    called: set[int],
    tap: mx.array,
) -> mx.array:
    """What the first block reads, with a tap added to the embedding's output.

    Args:
        runner: the loaded model.
        tokens: int (windows, tokens).
        first_block: the module.
        called: receives the id of each embedding that is called.
        tap: (windows, tokens, hidden).
    """

    def add_tap(embedding: nn.Module, out: mx.array, ids: mx.array) -> mx.array:
        called.add(id(embedding))
        return out + tap

    with patching.embeddings_changed(add_tap):
        try:
            args, _ = patching.arguments_of(first_block, lambda: trunk_output(runner, tokens))
        except patching.NotCalled:
            raise NoChain("the first block is never called") from None
    return args[0]
