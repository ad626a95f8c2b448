"""What each layer reads, block by block, as second moments for error feedback: `E[|g|^2 x x^T]` of
every expert.

Inputs are the source's own activations on its own tokens; the weights |g|^2 come from its
sensitivity. Only one block's inputs are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ...base.errors import MintError
from ...checkpoint.layers import Inventory, Layer
from ...checkpoint.source import Source
from ...measure.moments import POOL, takes_feedback
from ...measure.sensitivity import Sensitivity, TokenWeights
from ...runtime.blocks import forward_blocks
from ...runtime.runner import Runner, load_runner, release_block, trunk_output_from
from ...runtime.taps import Rows

POOLED = 16  # tokens that the pool is measured on, at most about twice as many, per column


@dataclass(frozen=True)
class Batch:
    """What one layer read in some windows: x (rows, columns) float32, each row's weight float32,
    its expert or None.
    """

    x: mx.array
    weight: np.ndarray
    part: np.ndarray | None

    def scaled(self, rows: Any) -> np.ndarray:
        """These rows (an index) times the roots of their weights."""
        scaled: np.ndarray = np.asarray(self.x)[rows] * np.sqrt(self.weight[rows])[:, None]
        return scaled


@dataclass(frozen=True)
class Inputs:
    """All that one layer, `path`, read. `parts` is the number of its experts, or one.

    Rows stay as the model made them (gate and up share theirs).
    """

    path: str
    batches: tuple[Batch, ...]
    parts: int

    def __getitem__(self, experts: slice) -> np.ndarray:
        """The weighted second moments of what these experts read, float32 (experts, columns,
        columns).

        Raises:
            MintError: naming the layer, where they overflow.
        """
        numbers = range(self.parts)[experts]
        found = np.empty((len(numbers), *self._borrowed.shape), dtype=np.float32)
        for moment, e in zip(found, numbers, strict=True):
            moment[:] = self._borrowed
            for rows in self._rows(e):
                moment += rows.T @ rows
            if not np.isfinite(np.diagonal(moment)).all():  # which has the largest numbers
                raise MintError(f"{self.path} has inputs that overflow: give --effort fast")
        return found

    def _rows(self, expert: int) -> Iterator[np.ndarray]:
        """All scaled rows of an expert at once, which are few; those of a layer without experts by
        batches.
        """
        if self.parts == 1:
            yield from (batch.scaled(slice(None)) for batch in self.batches)
        else:
            pairs = zip(self.batches, self._groups, strict=True)
            yield np.concatenate([batch.scaled(groups[expert]) for batch, groups in pairs])

    @cached_property
    def _groups(self) -> list[list[np.ndarray]]:
        """Which rows of each batch went to each expert."""
        found = []
        for batch in self.batches:
            assert batch.part is not None
            order = np.argsort(batch.part, kind="stable")
            found.append(
                np.split(order, np.searchsorted(batch.part[order], np.arange(1, self.parts)))
            )
        return found

    @cached_property
    def _borrowed(self) -> np.ndarray:
        """What each expert takes from all: the moment of POOL average rows a column."""
        columns, count = (
            self.batches[0].x.shape[1],
            sum(len(batch.weight) for batch in self.batches),
        )
        pool = np.zeros((columns, columns), dtype=np.float32)
        if self.parts == 1:
            return pool
        every = slice(None, None, max(1, count // (POOLED * columns)))
        seen = 0
        for batch in self.batches:
            rows = batch.scaled(every)
            pool += rows.T @ rows
            seen += len(rows)
        return POOL * columns / seen * pool


def block_inputs(
    source: Source, inventory: Inventory, sensitivity: Sensitivity, batch: int = 8
) -> Iterator[tuple[int | None, dict[str, Inputs]]]:
    """Yield each block's index with the inputs of its layers, and at last None with those of the
    head.

    Args:
        source: a checkpoint whose weights are here.
        inventory: its layers.
        sensitivity: with its tokens and their weights.
        batch: windows at once.
    """
    runner = load_runner(source.path)
    runner.model.train()  # as the sensitivity ran it: DBRX else calls its experts token by token
    parts = {layer.path: layer.experts for layer in inventory.layers}
    wanted = {layer.path for layer in inventory.layers if layer.kind in ("linear", "experts")}
    wanted &= sensitivity.weights.keys()
    tokens = sensitivity.tokens
    for step, out, rows in forward_blocks(runner, tokens, batch, wanted):
        last = out
        release_block(runner, step.block)  # its layers are quantized from the source
        yield step.index, weigh(rows, sensitivity, parts)
    yield None, head_inputs(runner, inventory, last, sensitivity)


def head_inputs(
    runner: Runner, inventory: Inventory, hidden: mx.array, sensitivity: Sensitivity
) -> dict[str, Inputs]:
    """What the head reads, where it isn't the embedding. `hidden` is the last block's output."""
    head = next((layer.path for layer in inventory.layers if layer.role == "head"), None)
    if head is None or head not in sensitivity.weights:
        return {}
    x = trunk_output_from(runner, mx.array(sensitivity.tokens), hidden).astype(mx.float32)
    mx.eval(x)
    rows = Batch(x.reshape(-1, x.shape[-1]), sensitivity.weights[head].weight[:, 0], None)
    return {head: Inputs(head, (rows,), 1)}


def weigh(
    rows: dict[str, list[Rows]], sensitivity: Sensitivity, parts: dict[str, int]
) -> dict[str, Inputs]:
    """What a block's layers read, each row with its weight. `parts` is the number of experts by
    layer.
    """
    return {
        path: Inputs(
            path, tuple(_weighted(r, sensitivity.weights[path]) for r in seen), parts[path]
        )
        for path, seen in rows.items()
    }


class Moments:
    """Hands out what layers read, in the model's order; the model runs on as it is asked for."""

    def __init__(self, source: Source, inventory: Inventory, sensitivity: Sensitivity) -> None:
        self._blocks = block_inputs(source, inventory, sensitivity)
        self._embedding = sensitivity.embedding
        self._layers = {layer.path: layer for layer in inventory.layers}
        self._here: int | None = -1
        self._inputs: dict[str, Inputs] = {}

    def of(self, path: str) -> Inputs | np.ndarray | None:
        """The moments of a layer, to be sliced by expert; None for one whose inputs aren't
        followed.
        """
        layer = self._layers[path]
        if not takes_feedback(layer):
            return None
        if layer.role == "embedding":
            return embedding_moments(layer, self._embedding)
        while self._here != layer.block:
            self._here, self._inputs = next(self._blocks)
        return self._inputs.get(path)


def embedding_moments(layer: Layer, moment: np.ndarray | None) -> np.ndarray | None:
    """What weighs an error in the rows of an embedding, float32 (1, hidden, hidden), where it was
    measured.
    """
    return (
        moment[None]
        if moment is not None and len(moment) == layer.shape[-1] and layer.kind == "embedding"
        else None
    )


def _weighted(rows: Rows, weights: TokenWeights) -> Batch:
    """A batch's rows with their weights."""
    if weights.part is None or rows.part is None:
        return Batch(rows.x, weights.weight[rows.token, 0], rows.part)
    same = weights.part[rows.token] == rows.part[:, None]
    mean = float(weights.weight.mean())  # for a token that another device sent to another expert
    weight = np.where(same.any(1), (weights.weight[rows.token] * same).sum(1), mean).astype(
        np.float32
    )
    return Batch(rows.x, weight, rows.part)
