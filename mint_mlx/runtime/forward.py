"""A model's predictions on windows of tokens, piece by piece, and which experts the tokens take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import patching
from .blocks import streamed_trunk_output
from .fast_math import fast_math
from .runner import LOGITS, Runner, logits_of, trunk_output


@dataclass
class Piece:
    """Logits of some windows at some positions, float32 (windows, positions, vocabulary)."""

    rows: slice
    columns: slice
    logits: mx.array


@dataclass
class Routing:
    """Which experts each token took.

    Attributes:
        layers: by expert layer in the order of the model, int (tokens, k), sorted, of each batch.
    """

    layers: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def arrays(self, shape: tuple[int, int]) -> list[np.ndarray]:
        """The choices of all windows, int (windows, tokens, k), for (windows, tokens)."""
        return [np.concatenate(batches).reshape(*shape, -1) for batches in self.layers.values()]


def forward(
    runner: Runner, tokens: np.ndarray, batch: int, routing: Routing | None = None
) -> Iterator[Piece]:
    """Run windows of tokens through a model and yield their logits, never more than LOGITS at once.

    Args:
        runner: a loaded model.
        tokens: int (windows, tokens).
        batch: windows at once.
        routing: receives the choice of experts, where the model has any.
    """
    if runner.streamed:
        with _recorded(routing), fast_math(runner.model):
            hidden = streamed_trunk_output(runner, mx.array(tokens), batch)
        for rows in _batches(len(tokens), batch):
            yield from _head(runner, tokens, rows, hidden[rows])
        return

    for rows in _batches(len(tokens), batch):
        with _recorded(routing), fast_math(runner.model):
            hidden = trunk_output(runner, mx.array(tokens[rows]))
            mx.eval(hidden)
        yield from _head(runner, tokens, rows, hidden)
        mx.clear_cache()


def _batches(windows: int, batch: int) -> Iterator[slice]:
    for start in range(0, windows, batch):
        yield slice(start, min(start + batch, windows))


def _head(runner: Runner, tokens: np.ndarray, rows: slice, hidden: mx.array) -> Iterator[Piece]:
    """What the model does after its trunk, position by position."""
    length = tokens.shape[1]
    step = 1
    start = 0
    while start < length:
        columns = slice(start, min(start + step, length))
        logits = logits_of(runner, mx.array(tokens[rows, columns]), hidden[:, columns])
        yield Piece(rows, columns, logits)
        start = columns.stop
        # The width of the logits is known after the first position.
        step = max(1, LOGITS // (logits.shape[0] * logits.shape[-1]))


def _recorded(routing: Routing | None) -> AbstractContextManager[None]:
    """Record the experts that tokens are sent to, for any family."""
    if routing is None:
        return nullcontext()

    def record(module: nn.Module, indices: mx.array) -> None:
        chosen = np.sort(np.asarray(indices).astype(np.int32), axis=-1)
        routing.layers.setdefault(id(module), []).append(chosen.reshape(-1, chosen.shape[-1]))

    return patching.routing_seen(record)
