"""What each layer reads, block by block, as second moments for error feedback: `E[|g|^2 x x^T]` of every expert.

Inputs are the source's own activations on its own tokens; the weights |g|^2 come from its sensitivity. Only one block's
inputs are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .blocks import Rows, run, walk
from .layers import Inventory
from .load import Source
from .runner import layer_names, load_block, load_runner, release_block, trunk_output_from
from .sensitivity import Sensitivity, TokenWeights

POOL = 1.0  # tokens of the pool that each expert borrows, per column


@dataclass(frozen=True)
class Inputs:
    """The rows that one layer read, with a weight each.

    Attributes:
        x: float32 (rows, columns).
        weight: float32 (rows,).
        part: int (rows,) or None.
        parts: experts of the layer, or one.
    """

    x: np.ndarray
    weight: np.ndarray
    part: np.ndarray | None
    parts: int

    def moments(self) -> np.ndarray:
        """The weighted second moment of each expert's inputs, float32 (experts, columns, columns)."""
        scaled = self.x * np.sqrt(self.weight)[:, None]
        if self.part is None or self.parts == 1:
            return (scaled.T @ scaled)[None]
        order = np.argsort(self.part, kind="stable")
        edges = np.searchsorted(self.part[order], np.arange(self.parts + 1))
        found = np.empty((self.parts, self.x.shape[1], self.x.shape[1]), dtype=np.float32)
        for e in range(self.parts):
            rows = scaled[order[edges[e] : edges[e + 1]]]
            np.matmul(rows.T, rows, out=found[e])
        pool = found.sum(axis=0) / len(self.x)  # of one average token
        return found + POOL * self.x.shape[1] * pool


def block_inputs(
    source: Source, inventory: Inventory, tokens: np.ndarray, sensitivity: Sensitivity, batch: int = 8
) -> Iterator[tuple[int | None, dict[str, Inputs]]]:
    """Yield each block's index with the inputs of its layers, and at last None with those of the head.

    Args:
        source: a checkpoint whose weights are here.
        inventory: its layers.
        tokens: int (windows, tokens), the ones that the sensitivity was measured on.
        sensitivity: with its token weights.
        batch: windows at once.
    """
    runner = load_runner(source.path)
    parts = {layer.path: layer.shape[0] if layer.kind == "experts" else 1 for layer in inventory.layers}
    wanted = {layer.path for layer in inventory.layers if layer.kind in ("linear", "experts")}
    names = {key: path for key, path in layer_names(runner).items() if path in wanted}
    blocks = walk(runner, tokens)
    step = next(blocks)
    while True:
        seen: dict[str, list[Rows]] = {}
        load_block(runner, step.block)
        names |= {key: path for key, path in layer_names(runner).items() if path in wanted}

        def visit(rows: Rows, seen: dict[str, list[Rows]] = seen) -> None:
            seen.setdefault(rows.path, []).append(rows)

        out = run(step, batch, visit, names)
        release_block(runner, step.block)
        known = {path: rows for path, rows in seen.items() if path in sensitivity.weights}
        yield step.index, {path: _gather(rows, parts[path], sensitivity.weights[path]) for path, rows in known.items()}
        try:
            step = blocks.send(out)
        except StopIteration:
            break
    head = next((layer.path for layer in inventory.layers if layer.role == "head"), None)
    if head is None:
        head = next(layer.path for layer in inventory.layers if layer.role == "embedding")
    x = np.asarray(trunk_output_from(runner, mx.array(tokens), out).astype(mx.float32))
    yield None, {head: Inputs(x.reshape(-1, x.shape[-1]), sensitivity.weights[head].weight[:, 0], None, 1)}


class Moments:
    """Hands out the second moments layer by layer, in the model's order; the model runs on as they are asked for."""

    def __init__(self, source: Source, inventory: Inventory, tokens: np.ndarray, sensitivity: Sensitivity) -> None:
        self._blocks = block_inputs(source, inventory, tokens, sensitivity)
        self._layers = {layer.path: layer for layer in inventory.layers}
        self._here: int | None = -1
        self._inputs: dict[str, Inputs] = {}

    def of(self, path: str) -> np.ndarray | None:
        """The moments of a layer; None for one whose inputs aren't followed (an embedding that is not the head)."""
        layer = self._layers[path]
        if layer.kind not in ("linear", "experts"):
            return None
        while path not in self._inputs and self._here is not None:
            self._here, self._inputs = next(self._blocks)
        found = self._inputs.get(path)
        return None if found is None else found.moments()


def _gather(rows: list[Rows], parts: int, weights: TokenWeights) -> Inputs:
    """All batches' rows with their weights."""
    x = np.concatenate([np.asarray(r.x) for r in rows])
    token = np.concatenate([r.token for r in rows])
    if rows[0].part is None:
        return Inputs(x, weights.weight[token, 0], None, parts)
    part = np.concatenate([np.asarray(r.part) for r in rows])
    if weights.part is None:
        return Inputs(x, weights.weight[token, 0], part, parts)
    same = weights.part[token] == part[:, None]
    mean = float(weights.weight.mean())  # for a token that another device sent to another expert
    weight = np.where(same.any(1), (weights.weight[token] * same).sum(1), mean).astype(np.float32)
    return Inputs(x, weight, part, parts)
