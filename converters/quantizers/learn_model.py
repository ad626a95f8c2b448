"""Runs `learn` over a model: the source and the quantized model side by side, a block at a time.

The source's block gives the inputs' moments (for the start) and the target; the quantized blocks
before it give what the block will really read. So blocks follow each other. What the quantized
blocks returned is stored in the work folder, from which an interrupted run is resumed, to the same
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ...base.array_files import read_tensors, write_tensors
from ...base.checksum import Damaged, if_sound
from ...base.folders import SCRATCH
from ...base.quant_config import QuantConfig
from ...base.remove import remove_file
from ...checkpoint.layers import MLX_DTYPES, Layer
from ...runtime.blocks import Step, call_block, first_input, forward_blocks, run
from ...runtime.device import fit_blas
from ...runtime.divergence import mean_kl
from ...runtime.runner import LOGITS, Runner, load_runner, logits_of, make_dense, trunk_output_from
from ...runtime.taps import Activations
from . import gptq, rtn
from .codes import Codes
from .grid_codes import codes_on_grid
from .inputs import Inputs, embedding_moments, head_inputs, hidden_size, weigh
from .learn_block import Block, learn, metric_cost, metric_root
from .learn_turns import learn_in_turns
from .memory_estimate import learns_head, turns
from .protocol import Work

BATCH = 8  # windows at once
Packed = dict[str, mx.array]  # a layer's tensors by local name


class Learner:
    """A quantizer that learns a block when the first of its layers is asked for."""

    def __init__(self, work: Work) -> None:
        assert work.sensitivity is not None
        self.work = work
        self.sensitivity = work.sensitivity
        self.tokens = work.sensitivity.tokens
        self.layers = {layer.path: layer for layer in work.inventory.layers}
        fit_blas(hidden_size(work.inventory))  # as in Moments
        self.turns = turns(work.inventory, self.tokens.size)
        self._blocks: Iterator[tuple[int | None, dict[str, Packed]]] | None = None
        self._block: int | None = -1  # before the first
        self._packed: dict[str, Packed] = {}

    def __call__(self, layer: Layer, weight: mx.array, config: QuantConfig) -> Packed:
        """One layer's tensors. What isn't followed is rounded to nearest."""
        on_grid = self._grid_codes(layer.path, weight)
        if on_grid is not None:
            return on_grid
        if layer.role == "embedding":
            moments = embedding_moments(layer, self.sensitivity.embedding)
            return gptq.quantize(weight, config, moments, searched=True)
        if layer.block is not None or layer.role == "head":
            if self._blocks is None:
                self._blocks = self._run(layer.block)
            while self._block != layer.block:
                self._block, self._packed = next(self._blocks)
        packed = self._packed.get(layer.path)
        return rtn.quantize(weight, config) if packed is None else packed

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
            packed, hidden = self._learn_block(runner, step, out, activations, hidden)
            self._store(step.index + 1, hidden)
            yield step.index, packed

        assert hidden is not None  # there is a block
        yield None, self._learn_head(runner, last, hidden)

    def _changed(self, role: str | None, block: int | None) -> list[str]:
        """Layers of a role or a block that don't stay as the source has them."""
        choice = self.work.choice
        return [
            path
            for path, layer in self.layers.items()
            if layer.block == block and role in (None, layer.role)
            if choice[path].quantized and choice[path] != layer.stored
        ]

    def _weight(self, path: str, module: nn.Module) -> mx.array:
        """A layer's weight in the type that its scales will have."""
        return module.weight.astype(getattr(mx, MLX_DTYPES[self.layers[path].dtype]))

    def _grid_codes(self, path: str, weight: mx.array) -> Packed | None:
        """The codes of a layer whose weights lie on a grid already: there is nothing to learn."""
        if not self.work.grids:
            return None
        return codes_on_grid(self.layers[path], weight, self.work.choice[path])

    def _put_codes(self, modules: dict[str, nn.Module], path: str, codes: Codes) -> None:
        self._put(path, modules[path], codes.packed())

    def _put(self, path: str, module: nn.Module, packed: Packed) -> None:
        """Let a layer have the weight that its codes mean."""
        c = self.work.choice[path]
        weight = mx.dequantize(
            packed["weight"], packed["scales"], packed.get("biases"), c.group_size, c.bits, c.mode
        )
        module.weight = weight.astype(module.weight.dtype)

    def _embedded(self, runner: Runner) -> mx.array:
        """What the first block reads once the embedding is quantized."""
        modules = make_dense(runner, self._changed("embedding", None))
        exact = {path: module.weight for path, module in modules.items()}
        for path, module in modules.items():
            moments = embedding_moments(self.layers[path], self.sensitivity.embedding)
            config = self.work.choice[path]
            weight = self._weight(path, module)
            packed = self._grid_codes(path, weight) or gptq.quantize(
                weight, config, moments, searched=True
            )
            self._put(path, module, packed)
        hidden = first_input(runner, self.tokens)

        # The source's own blocks go on from the source's embedding.
        for path, module in modules.items():
            module.weight = exact[path]
        return hidden

    def _learn_block(
        self,
        runner: Runner,
        step: Step,
        out: mx.array,
        activations: dict[str, list[Activations]],
        hidden: mx.array,
    ) -> tuple[dict[str, Packed], mx.array]:
        """One block's layers, and what it returns once they are quantized.

        Args:
            runner: the source, with this block loaded.
            step: the block.
            out: what it returns in the source, (windows, tokens, hidden).
            activations: what its layers read in the source.
            hidden: what it reads once the blocks before it are quantized, as `out`.
        """
        modules = make_dense(runner, self._changed(None, step.index))
        packed, start = self._begin(modules, activations)
        exact = {path: modules[path].weight for path in start}
        for path in packed.keys() - start.keys():
            self._put(path, modules[path], packed[path])

        if start:
            block = Block(
                call=partial(call_block, step),
                modules={path: modules[path] for path in start},
                exact=exact,
                start=start,
                # 16 bits would drown the errors of layers of 6 and 8 bits.
                inputs=hidden.astype(mx.float32),
                targets=out.astype(mx.float32),
                cost=partial(metric_cost, metric_root(self.sensitivity.metric[step.index])),
            )
            learned = learn_in_turns(
                block,
                [path for path in start if self.layers[path].kind == "experts"],
                self.turns,
                partial(self._put_codes, modules),
                step.index,
                partial(self._say, f"block {step.index}", step.index),
            )
            packed |= {path: codes.packed() for path, codes in learned.items()}

        for path in start:
            self._put(path, modules[path], packed[path])
        quantized_out = run(step.with_input(hidden), BATCH)

        # Nothing runs these layers again, and dense ones would add up to the whole model.
        for module in modules.values():
            module.clear()
        mx.clear_cache()
        return packed, quantized_out

    def _begin(
        self, modules: dict[str, nn.Module], activations: dict[str, list[Activations]]
    ) -> tuple[dict[str, Packed], dict[str, Codes]]:
        """What a block starts from.

        Args:
            modules: its layers that are quantized, dense.
            activations: what they read; emptied, since nothing needs it while they are learned.

        Returns:
            All these layers by error feedback or rounded to nearest; and the codes of those to be
            learned.
        """
        experts = {path: layer.experts for path, layer in self.layers.items()}
        inputs = weigh(activations, self.sensitivity, experts)
        activations.clear()

        packed: dict[str, Packed] = {}
        start: dict[str, Codes] = {}
        for path, module in modules.items():
            weight = self._weight(path, module)
            config = self.work.choice[path]
            on_grid = self._grid_codes(path, weight)
            if on_grid is not None:
                packed[path] = on_grid
                continue
            if path not in inputs or config.mode != "affine":
                packed[path] = rtn.quantize(weight, config)
                continue
            codes = gptq.find_codes(weight, config, inputs[path], searched=True)
            packed[path] = codes.packed()
            if self.layers[path].role != "router":
                start[path] = codes
        return packed, start

    def _learn_head(self, runner: Runner, out: mx.array, hidden: mx.array) -> dict[str, Packed]:
        """The head, so that predictions from the quantized blocks' output stay the source's.

        Args:
            runner: the source.
            out: what its last block returns, (windows, tokens, hidden).
            hidden: what the quantized one returns.
        """
        inputs = head_inputs(runner, self.work.inventory, out, self.sensitivity)
        if not inputs:
            return {}
        ((path, moments),) = inputs.items()
        module = make_dense(runner, inputs)[path]
        config = self.work.choice[path]
        on_grid = self._grid_codes(path, self._weight(path, module))
        if on_grid is not None:
            return {path: on_grid}
        if config.mode != "affine":
            return {path: gptq.quantize(self._weight(path, module), config, moments, True)}

        start = gptq.find_codes(self._weight(path, module), config, moments, searched=True)
        if learns_head(self.layers[path]):
            block = self._head_block(runner, module, moments, start, hidden)
            start = learn(block, progress=partial(self._say, "head", self._depth))[path]
        return {path: start.packed()}

    def _head_block(
        self,
        runner: Runner,
        module: nn.Module,
        moments: Inputs,
        start: Codes,
        hidden: mx.array,
    ) -> Block:
        """The head as a block to be learned, from what the trunk returns to its logits.

        Args:
            runner: the source.
            module: the head, dense.
            moments: what it reads in the source.
            start: error feedback's codes.
            hidden: what the quantized model's last block returns.
        """
        exact = module.weight
        top = trunk_output_from(runner, mx.array(self.tokens), hidden).astype(mx.float32)
        target = moments.batches[0].x.reshape(top.shape)
        mx.eval(top)

        def call(top: mx.array) -> mx.array:
            return logits_of(runner, mx.array(self.tokens[: len(top)]), top)

        # The target's logits are computed anew each time: all of them would be too large to hold.
        def cost(logits: mx.array, target: mx.array) -> mx.array:
            module.weight = exact
            return mean_kl(logits, call(target))

        return Block(
            call=call,
            modules={moments.path: module},
            exact={moments.path: exact},
            start={moments.path: start},
            inputs=top,
            targets=target,
            cost=cost,
            most=2 * LOGITS // self.layers[moments.path].shape[0],
        )

    @property
    def _depth(self) -> int:
        """How many blocks there are."""
        return self.work.inventory.blocks

    def _say(self, what: str, before: int, step: int, steps: int) -> None:
        """Tell how far a block is that is learned; `before` is how many are done."""
        share = (before + step / steps) / (self._depth + 1)
        self.work.say(f"{what} learns, step {step} of {steps}", share)

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
