"""What each layer reads, block by block, as second moments for error feedback.

Of every expert it is `E[|g| x x^T]`: inputs x are the source's own activations on its own tokens,
the gradients |g| come from its sensitivity. What an error costs goes with |g|^2, but a few tokens
have most of that: on text that error feedback hasn't seen less is lost where they count by the root
(docs/research-log.md). Only one block's inputs are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ...base.errors import MintError
from ...checkpoint.layers import Inventory, Layer
from ...checkpoint.source import Source
from ...measure.moments import POOL, add_ridge, borrows, damp, effective_rows, takes_feedback
from ...measure.sensitivity import Sensitivity, TokenWeights
from ...runtime.blocks import forward_blocks
from ...runtime.device import fit_blas
from ...runtime.runner import Runner, load_runner, release_block, trunk_output_from
from ...runtime.taps import Activations

EMBEDDING_DAMPING = 0.2  # of the mean diagonal: few tokens have most of what its moment sums up
POOLED = 16  # tokens that the pool is measured on, at most about twice as many, per column


@dataclass(frozen=True)
class Batch:
    """What one layer read in some windows.

    Attributes:
        x: float32 (rows, columns).
        weight: float32 (rows,), the weight of each row.
        expert: int (rows,), the expert of each row; None for a layer without.
    """

    x: mx.array
    weight: np.ndarray
    expert: np.ndarray | None

    def scaled(self, index: np.ndarray | slice) -> np.ndarray:
        """Some rows times the roots of their weights."""
        scaled: np.ndarray = np.asarray(self.x)[index] * np.sqrt(self.weight[index])[:, None]
        return scaled


@dataclass(frozen=True)
class Inputs:
    """All that one layer read, to be sliced by expert.

    Rows stay as the model made them (gate and up share theirs).

    Attributes:
        path: the layer.
        batches: what it read.
        experts: how many it has; one of a layer without.
    """

    path: str
    batches: tuple[Batch, ...]
    experts: int

    def __getitem__(self, some: slice) -> np.ndarray:
        """The weighted second moments of what these experts read.

        Returns:
            float32 (experts, columns, columns).

        Raises:
            MintError: naming the layer, where they overflow.
        """
        indices = range(self.experts)[some]
        moments = np.empty((len(indices), *self._borrowed.shape), dtype=np.float32)
        for moment, expert in zip(moments, indices, strict=True):
            moment[:] = self._borrowed
            for rows in self._rows(expert):
                moment += rows.T @ rows
            add_ridge(moment, self._effective_rows[expert])
            if not np.isfinite(np.diagonal(moment)).all():  # which has the largest numbers
                raise MintError(f"{self.path} has inputs that overflow: give --effort fast")
        return moments

    @cached_property
    def _effective_rows(self) -> list[float]:
        """How many rows of one weight each second moment is of; all, where an expert borrows."""
        if self.experts == 1 or borrows(self.path):
            every = np.concatenate([batch.weight for batch in self.batches])
            return [effective_rows(every)] * self.experts
        pairs = zip(self.batches, self._rows_by_expert, strict=True)
        weights = [[batch.weight[rows] for rows in by_expert] for batch, by_expert in pairs]
        return [effective_rows(np.concatenate(parts)) for parts in zip(*weights, strict=True)]

    def _rows(self, expert: int) -> Iterator[np.ndarray]:
        """The scaled rows of an expert.

        Those of one among several at once, as they are few; those of a layer without by batches.
        """
        if self.experts == 1:
            yield from (batch.scaled(slice(None)) for batch in self.batches)
        else:
            pairs = zip(self.batches, self._rows_by_expert, strict=True)
            yield np.concatenate([batch.scaled(by_expert[expert]) for batch, by_expert in pairs])

    @cached_property
    def _rows_by_expert(self) -> list[list[np.ndarray]]:
        """Of each batch, the indices of the rows that went to each expert."""
        indices = []
        for batch in self.batches:
            assert batch.expert is not None
            indices.append(by_expert(batch.expert, self.experts))
        return indices

    @cached_property
    def _borrowed(self) -> np.ndarray:
        """What an expert takes from all where it borrows: POOL average rows a column."""
        columns = self.batches[0].x.shape[1]
        pool = np.zeros((columns, columns), dtype=np.float32)
        if self.experts == 1:
            return pool
        mx.eval([batch.x for batch in self.batches])  # which the threads of experts can't
        if not borrows(self.path):
            return pool

        # A sample of the rows is enough for an average.
        count = sum(len(batch.weight) for batch in self.batches)
        sample = slice(None, None, max(1, count // (POOLED * columns)))
        sampled = 0
        for batch in self.batches:
            rows = batch.scaled(sample)
            pool += rows.T @ rows
            sampled += len(rows)
        return POOL * columns / sampled * pool


def by_expert(expert: np.ndarray, experts: int) -> list[np.ndarray]:
    """The indices of each expert's rows, in their order, of int (rows,)."""
    order = np.argsort(expert, kind="stable")
    edges = np.searchsorted(expert[order], np.arange(1, experts))
    return np.split(order, edges)


def block_inputs(
    source: Source, inventory: Inventory, sensitivity: Sensitivity, batch: int = 8
) -> Iterator[tuple[int | None, dict[str, Inputs]]]:
    """Yield each block's index with the inputs of its layers, and at last None with the head's.

    Args:
        source: a checkpoint whose weights are on this machine.
        inventory: its layers.
        sensitivity: with its tokens and their weights.
        batch: windows at once.
    """
    runner = load_runner(source.path, dtype=source.dtype)
    runner.model.train()  # as the sensitivity ran it: DBRX else calls its experts token by token
    experts = {layer.path: layer.experts for layer in inventory.layers}
    wanted = {layer.path for layer in inventory.layers if layer.kind in ("linear", "experts")}
    wanted &= sensitivity.weights.keys()
    for step, out, activations in forward_blocks(runner, sensitivity.tokens, batch, wanted):
        last = out
        release_block(runner, step.block)  # its layers are quantized from the source
        yield step.index, weigh(activations, sensitivity, experts)
    yield None, head_inputs(runner, inventory, last, sensitivity)


def head_inputs(
    runner: Runner, inventory: Inventory, hidden: mx.array, sensitivity: Sensitivity
) -> dict[str, Inputs]:
    """What the head reads, by its path; nothing where it is the embedding.

    Args:
        runner: the loaded model.
        inventory: its layers.
        hidden: (windows, tokens, hidden), the last block's output.
        sensitivity: with its tokens and their weights.
    """
    head = next((layer.path for layer in inventory.layers if layer.role == "head"), None)
    if head is None or head not in sensitivity.weights:
        return {}
    read = head_rows(runner, head, sensitivity.tokens, hidden)
    return weigh({head: [read]}, sensitivity, {head: 1})


def head_rows(runner: Runner, path: str, tokens: np.ndarray, hidden: mx.array) -> Activations:
    """What the head reads, a row for each token.

    Args:
        runner: the loaded model.
        path: of the head.
        tokens: int (windows, tokens).
        hidden: (windows, tokens, hidden), the last block's output.
    """
    x = trunk_output_from(runner, mx.array(tokens), hidden).astype(mx.float32)
    mx.eval(x)
    rows = x.reshape(-1, x.shape[-1])
    return Activations(path, rows, None, None, np.arange(len(rows)))


def weigh(
    activations: dict[str, list[Activations]], sensitivity: Sensitivity, experts: dict[str, int]
) -> dict[str, Inputs]:
    """What layers read, each row with its weight.

    Args:
        activations: by layer.
        sensitivity: with the weights of its tokens.
        experts: how many each layer has.
    """
    inputs = {}
    counted = sensitivity.text.counted
    for path, batches in activations.items():
        weights = sensitivity.weights[path]
        weights = TokenWeights(np.sqrt(weights.weight), weights.expert)
        usual = usual_weights(weights, counted)
        weighted = tuple(_weighted(batch, weights, usual) for batch in batches)
        inputs[path] = Inputs(path, weighted, experts[path])
    return inputs


class Moments:
    """Hands out what layers read, in the model's order; the model runs on as it is asked for."""

    def __init__(self, source: Source, inventory: Inventory, sensitivity: Sensitivity) -> None:
        # An embedding comes before the model is run: a resumed run multiplies as the first one did.
        fit_blas(hidden_size(inventory))
        self._blocks = block_inputs(source, inventory, sensitivity)
        self._embedding = sensitivity.embedding
        self._layers = {layer.path: layer for layer in inventory.layers}
        self._block: int | None = -1  # before the first
        self._inputs: dict[str, Inputs] = {}

    def of(self, path: str) -> Inputs | np.ndarray | None:
        """The moments of a layer, to be sliced by expert; None where its inputs aren't followed."""
        layer = self._layers[path]
        if not takes_feedback(layer):
            return None
        if layer.role == "embedding":
            return embedding_moments(layer, self._embedding)
        while self._block != layer.block:
            self._block, self._inputs = next(self._blocks)
        return self._inputs.get(path)


def hidden_size(inventory: Inventory) -> int:
    """Columns of the embedding."""
    return max(layer.shape[-1] for layer in inventory.layers if layer.role == "embedding")


def embedding_moments(layer: Layer, moment: np.ndarray | None) -> np.ndarray | None:
    """What weighs an error in the rows of an embedding, damped; None where it wasn't measured.

    Args:
        layer: an embedding.
        moment: the sensitivity's, float32 (hidden, hidden), or None.

    Returns:
        float32 (1, hidden, hidden).
    """
    if moment is None or layer.kind != "embedding" or len(moment) != layer.shape[-1]:
        return None
    damped = moment.copy()
    damp(damped, EMBEDDING_DAMPING)
    return damped[None]


def usual_weights(weights: TokenWeights, counted: np.ndarray) -> np.ndarray:
    """What each token of a text weighs that was not measured: the mean of those at such a place.

    The first tokens of a window weigh more than later ones. Places are taken together in runs, each
    twice as long as the one before: one token of a great weight is not to speak for its place. The
    tokens of prompts have a mean of their own: they weigh only by what follows from them.

    Args:
        weights: of the measured tokens.
        counted: of `Text`, bool (windows, length).

    Returns:
        float32 (windows * length,).
    """
    length = counted.shape[1]
    of_token = weights.weight.mean(1).reshape(-1, length)
    run = np.broadcast_to(np.log2(np.arange(length) + 1).astype(np.int64), counted.shape)
    place = np.where(counted, run + 1, 0)

    measured = place[: len(of_token)]
    totals = np.bincount(measured.reshape(-1), of_token.reshape(-1), minlength=place.max() + 1)
    counts = np.bincount(measured.reshape(-1), minlength=place.max() + 1)
    means = totals / np.maximum(counts, 1)
    return means[place].astype(np.float32).reshape(-1)


def _weighted(rows: Activations, weights: TokenWeights, usual_by_token: np.ndarray) -> Batch:
    """What a layer read in some windows, with each row's weight.

    Args:
        rows: what it read.
        weights: of the measured tokens.
        usual_by_token: of `usual_weights`, for all others.
    """
    usual = usual_by_token[rows.token]
    known = rows.token < len(weights.weight)
    token = np.where(known, rows.token, 0)
    if weights.expert is None or rows.expert is None:
        weight = np.where(known, weights.weight[token, 0], usual)
        return Batch(rows.x, weight, rows.expert)
    is_slot = (weights.expert[token] == rows.expert[:, None]) & known[:, None]
    of_slot = (weights.weight[token] * is_slot).sum(1)

    # So has a token that another device sent to another expert.
    weight = np.where(is_slot.any(1), of_slot, usual).astype(np.float32)
    return Batch(rows.x, weight, rows.expert)
