"""Walks through a model, the source and the quantized one side by side, a block at a time.

The quantized blocks before one give what it will really read, so blocks follow each other. What
they returned is stored in the work folder, from which an interrupted run is resumed, to the same
bytes. How a block's layers are quantized is up to who walks (drift_model.py, learn_model.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ...base.array_files import read_tensors, write_tensors
from ...base.checksum import Damaged, if_sound
from ...base.folders import SCRATCH
from ...base.quant_config import QuantConfig
from ...base.remove import remove_file
from ...checkpoint.layers import MLX_DTYPES, Layer
from ...runtime.blocks import Step, first_input, forward_blocks
from ...runtime.device import fit_blas
from ...runtime.runner import Runner, load_runner, make_dense
from ...runtime.taps import Activations
from . import gptq
from .grid_codes import codes_on_grid
from .inputs import embedding_moments, hidden_size
from .protocol import Work

BATCH = 8  # windows at once
Packed = dict[str, mx.array]  # a layer's tensors by local name


@dataclass(frozen=True)
class WalkedBlock:
    """A block that is to be quantized.

    Attributes:
        step: the block, loaded.
        modules: its layers that are quantized, dense, with the source's weights.
        out: what it returns in the source, (windows, tokens, hidden).
        activations: what its layers read in the source; may be emptied.
        hidden: what it reads once the blocks before it are quantized, as `out`.
    """

    step: Step
    modules: dict[str, nn.Module]
    out: mx.array
    activations: dict[str, list[Activations]]
    hidden: mx.array


class Walk(ABC):
    """A quantizer that quantizes a block when the first of its layers is asked for."""

    def __init__(self, work: Work) -> None:
        assert work.sensitivity is not None
        self.work = work
        self.sensitivity = work.sensitivity
        self.tokens = work.sensitivity.tokens
        self.layers = {layer.path: layer for layer in work.inventory.layers}
        fit_blas(hidden_size(work.inventory))  # as in Moments
        self._blocks: Iterator[tuple[int | None, dict[str, Packed]]] | None = None
        self._block: int | None = -1  # before the first
        self._packed: dict[str, Packed] = {}

    @abstractmethod
    def quantize_block(self, block: WalkedBlock) -> tuple[dict[str, Packed], mx.array]:
        """The layers of one block, and what it returns once they are quantized."""

    @abstractmethod
    def quantize_head(self, runner: Runner, out: mx.array, hidden: mx.array) -> dict[str, Packed]:
        """The head by its path; nothing where it is the embedding.

        Args:
            runner: the source.
            out: what its last block returns, (windows, tokens, hidden).
            hidden: what the quantized one returns.
        """

    @abstractmethod
    def quantize_other(self, weight: mx.array, config: QuantConfig) -> Packed:
        """A layer whose inputs aren't followed."""

    def __call__(self, layer: Layer, weight: mx.array, config: QuantConfig) -> Packed:
        """The tensors of one layer. (Those that keep the codes of a grid aren't asked for.)"""
        if layer.role == "embedding":
            return self._quantize_embedding(layer, weight, config)
        if layer.block is not None or layer.role == "head":
            if self._blocks is None:
                self._blocks = self._run(layer.block)
            while self._block != layer.block:
                self._block, self._packed = next(self._blocks)
        packed = self._packed.get(layer.path)
        return self.quantize_other(weight, config) if packed is None else packed

    def _run(self, first: int | None) -> Iterator[tuple[int | None, dict[str, Packed]]]:
        """Yield each block's layers, from one that is asked for on; at last None with the head."""
        runner = load_runner(self.work.source.path, dtype=self.work.source.dtype)
        runner.model.train()  # some families' fused kernels have no gradient
        start, hidden = self._resume(runner, first)
        followed = {
            path for path, layer in self.layers.items() if layer.kind in ("linear", "experts")
        }
        wanted = followed & self.sensitivity.weights.keys()

        for step, out, activations in forward_blocks(runner, self.tokens, BATCH, wanted, start):
            last = out
            if step.index < start:
                continue
            if hidden is None:
                hidden = self._embedded(runner)
            modules = make_dense(runner, self.changed(None, step.index))
            block = WalkedBlock(step, modules, out, activations, hidden)
            packed, hidden = self.quantize_block(block)
            mx.eval(hidden)

            # Nothing runs these layers again, and dense ones would add up to the whole model.
            for module in modules.values():
                module.clear()
            mx.clear_cache()
            self._store(step.index + 1, hidden)
            yield step.index, packed

        assert hidden is not None  # there is a block
        yield None, self.quantize_head(runner, last, hidden)

    def changed(self, role: str | None, block: int | None) -> list[str]:
        """Layers of a role or a block that don't stay as the source has them."""
        choice = self.work.choice
        return [
            path
            for path, layer in self.layers.items()
            if layer.block == block and role in (None, layer.role)
            if choice[path].quantized and choice[path] != layer.stored
        ]

    def weight(self, path: str, module: nn.Module) -> mx.array:
        """A layer's weight in the type that its scales will have."""
        return module.weight.astype(getattr(mx, MLX_DTYPES[self.layers[path].dtype]))

    def grid_codes(self, path: str, weight: mx.array) -> Packed | None:
        """The codes of a layer whose weights lie on a grid already: there is nothing to learn."""
        if not self.work.grids:
            return None
        return codes_on_grid(self.layers[path], weight, self.work.choice[path])

    def put(self, path: str, module: nn.Module, packed: Packed) -> None:
        """Let a layer have the weight that its codes mean."""
        c = self.work.choice[path]
        weight = mx.dequantize(
            packed["weight"], packed["scales"], packed.get("biases"), c.group_size, c.bits, c.mode
        )
        module.weight = weight.astype(module.weight.dtype)

    def _quantize_embedding(self, layer: Layer, weight: mx.array, config: QuantConfig) -> Packed:
        moments = embedding_moments(layer, self.sensitivity.embedding)
        return gptq.quantize(weight, config, moments, searched=True)

    def _embedded(self, runner: Runner) -> mx.array:
        """What the first block reads once the embedding is quantized."""
        modules = make_dense(runner, self.changed("embedding", None))
        exact = {path: module.weight for path, module in modules.items()}
        for path, module in modules.items():
            weight = self.weight(path, module)
            packed = self.grid_codes(path, weight) or self._quantize_embedding(
                self.layers[path], weight, self.work.choice[path]
            )
            self.put(path, module, packed)
        hidden = first_input(runner, self.tokens)

        # The source's own blocks go on from the source's embedding.
        for path, module in modules.items():
            module.weight = exact[path]
        return hidden

    def _store(self, block: int, hidden: mx.array) -> None:
        """Store what a block will read, to resume from it.

        What the block before it read is still needed: that block's layers aren't written yet.
        """
        write_tensors(self._hidden_file(block), {"hidden": hidden})
        remove_file(self._hidden_file(block - 2))

    def _resume(self, runner: Runner, first: int | None) -> tuple[int, mx.array | None]:
        """The block to go on from and what it reads, stored by an earlier run.

        It is the last one at or before `first`, the block that is asked for (None: the head); block
        0 where there is none.
        """
        for block in range(len(runner.blocks) if first is None else first, 0, -1):
            hidden = if_sound(self._hidden_file(block), self._read_hidden)
            if hidden is not None:
                return block, hidden
        return 0, None

    def _read_hidden(self, file: Path) -> mx.array:
        """What a block reads, (windows, tokens, hidden), as `_store` wrote it.

        Raises:
            Damaged: it is something else.
        """
        hidden = read_tensors(file).get("hidden")
        if hidden is None or hidden.shape[:2] != self.tokens.shape:
            raise Damaged(f"{file} is damaged")
        return hidden

    def _hidden_file(self, block: int) -> Path:
        return self.work.folder / f"{SCRATCH}hidden-{block}.safetensors"
