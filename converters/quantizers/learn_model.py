"""Runs `learn` over a model: the source and the quantized model side by side, a block at a time.

The source's block gives the inputs' moments (for the start) and the target; the quantized blocks
before it give what the block will really read. So blocks follow each other. What the quantized
blocks returned is kept in the work folder, from which an interrupted run goes on, to the same
bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...base.files import read_tensors, write_tensors
from ...base.quant_config import QuantConfig
from ...checkpoint.layers import MLX_DTYPES, Layer
from ...runtime.blocks import Step, call_block, first_input, forward_blocks, run
from ...runtime.divergence import mean_kl
from ...runtime.runner import LOGITS, Runner, load_runner, logits_of, make_dense, trunk_output_from
from ...runtime.taps import Rows
from . import gptq, rtn
from .codes import Codes
from .gptq import SecondMoments
from .inputs import embedding_moments, head_inputs, weigh
from .learn_block import Block, learn, metric_cost, metric_root
from .learn_turns import learn_in_turns
from .memory_estimate import learns_head, turns
from .protocol import SCRATCH, Work

BATCH = 8  # windows at once
Packed = dict[str, mx.array]


class Learner:
    """A quantizer that learns a block when the first of its layers is asked for."""

    def __init__(self, work: Work) -> None:
        assert work.sensitivity is not None
        self.work = work
        self.sensitivity = work.sensitivity
        self.tokens = work.sensitivity.tokens
        self.layers = {layer.path: layer for layer in work.inventory.layers}
        self.turns = turns(work.inventory, self.tokens.size)
        self._blocks: Iterator[tuple[int | None, dict[str, Packed]]] | None = None
        self._here: int | None = -1
        self._found: dict[str, Packed] = {}

    def __call__(self, layer: Layer, weight: mx.array, config: QuantConfig) -> Packed:
        """One layer's tensors. What isn't followed is rounded to nearest."""
        if layer.role == "embedding":
            return gptq.quantize(
                weight, config, embedding_moments(layer, self.sensitivity.embedding)
            )
        if layer.block is not None or layer.role == "head":
            if self._blocks is None:
                self._blocks = self._run(layer.block)
            while self._here != layer.block:
                self._here, self._found = next(self._blocks)
        found = self._found.get(layer.path)
        return rtn.quantize(weight, config) if found is None else found

    def _run(self, first: int | None) -> Iterator[tuple[int | None, dict[str, Packed]]]:
        """Yield each block's layers, from one that is asked for on; at last None with the head."""
        runner = load_runner(self.work.source.path)
        runner.model.train()  # some families' fused kernels have no gradient
        start, hidden = self._resume(runner, first)
        followed = {
            path for path, layer in self.layers.items() if layer.kind in ("linear", "experts")
        }
        wanted = followed & self.sensitivity.weights.keys()
        for step, out, rows in forward_blocks(runner, self.tokens, BATCH, wanted, start):
            last = out
            if step.index < start:
                continue
            if hidden is None:
                hidden = self._embedded(runner)
            found, hidden = self._learn_block(runner, step, out, rows, hidden)
            self._keep(step.index + 1, hidden)
            yield step.index, found
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

    def _feedback(self, path: str, module: Any, moments: SecondMoments | None) -> Packed:
        return gptq.quantize(self._weight(path, module), self.work.choice[path], moments)

    def _weight(self, path: str, module: Any) -> mx.array:
        """A layer's weight in the type that its scales will have."""
        weight: mx.array = module.weight.astype(getattr(mx, MLX_DTYPES[self.layers[path].dtype]))
        return weight

    def _put_codes(self, modules: dict[str, Any], path: str, codes: Codes) -> None:
        self._put(path, modules[path], codes.packed())

    def _put(self, path: str, module: Any, packed: Packed) -> None:
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
            self._put(path, module, self._feedback(path, module, moments))
        hidden = first_input(runner, self.tokens)
        for (
            path,
            module,
        ) in modules.items():  # the source's own blocks go on from the source's embedding
            module.weight = exact[path]
        return hidden

    def _learn_block(
        self,
        runner: Runner,
        step: Step,
        out: mx.array,
        rows: dict[str, list[Rows]],
        hidden: mx.array,
    ) -> tuple[dict[str, Packed], mx.array]:
        """One block's layers, and what it returns once they are quantized."""
        modules = make_dense(runner, self._changed(None, step.index))
        packed, start = self._begin(modules, rows)
        exact = {path: modules[path].weight for path in start}
        for path in packed.keys() - start.keys():
            self._put(path, modules[path], packed[path])
        if start:
            block = Block(
                call=partial(call_block, step),
                modules={path: modules[path] for path in start},
                exact=exact,
                start=start,
                inputs=hidden.astype(
                    mx.float32
                ),  # 16 bits would drown the errors of layers of 6 and 8 bits
                targets=out.astype(mx.float32),
                cost=partial(metric_cost, metric_root(self.sensitivity.metric[step.index])),
            )
            stacks = [path for path in start if self.layers[path].kind == "experts"]
            told = partial(self._say, f"block {step.index}")
            learned = learn_in_turns(
                block, stacks, self.turns, partial(self._put_codes, modules), step.index, told
            )
            packed |= {path: codes.packed() for path, codes in learned.items()}
        for path in start:
            self._put(path, modules[path], packed[path])
        done = run(replace(step, args=(hidden, *step.args[1:])), BATCH)
        for module in (
            modules.values()
        ):  # nothing runs them again, and dense ones would add up to the whole model
            module.clear()
        mx.clear_cache()
        return packed, done

    def _begin(
        self, modules: dict[str, Any], rows: dict[str, list[Rows]]
    ) -> tuple[dict[str, Packed], dict[str, Codes]]:
        """What a block begins with: all its layers by error feedback or to nearest, and codes of
        those to be learned.

        What the layers read is dropped: while they are learned nobody needs it.
        """
        inputs = weigh(
            rows, self.sensitivity, {path: layer.experts for path, layer in self.layers.items()}
        )
        rows.clear()
        packed: dict[str, Packed] = {}
        start: dict[str, Codes] = {}
        for path, module in modules.items():
            weight, config = self._weight(path, module), self.work.choice[path]
            if path not in inputs or config.mode != "affine":
                packed[path] = rtn.quantize(weight, config)
                continue
            codes = gptq.find_codes(weight, config, inputs[path])
            packed[path] = codes.packed()
            if self.layers[path].role != "router":
                start[path] = codes
        return packed, start

    def _learn_head(self, runner: Runner, out: mx.array, hidden: mx.array) -> dict[str, Packed]:
        """The head, so that the predictions on what the quantized blocks return stay the source's.

        Args:
            out: what the source's last block returns.
            hidden: what the quantized one does.
        """
        inputs = head_inputs(runner, self.work.inventory, out, self.sensitivity)
        if not inputs:
            return {}
        ((path, moments),) = inputs.items()
        layer, config, module = (
            self.layers[path],
            self.work.choice[path],
            make_dense(runner, inputs)[path],
        )
        if config.mode != "affine":
            return {path: self._feedback(path, module, moments)}
        start = gptq.find_codes(self._weight(path, module), config, moments)
        if not learns_head(layer):
            return {path: start.packed()}
        exact = module.weight
        top = trunk_output_from(runner, mx.array(self.tokens), hidden).astype(mx.float32)
        target = moments.batches[0].x.reshape(top.shape)
        mx.eval(top)

        def call(top: mx.array) -> mx.array:
            return logits_of(runner, mx.array(self.tokens[: len(top)]), top)

        def cost(ours: mx.array, target: mx.array) -> mx.array:
            module.weight = exact
            return mean_kl(ours, call(target))

        most = 2 * LOGITS // layer.shape[0]
        head = Block(call, {path: module}, {path: exact}, {path: start}, top, target, cost, most)
        return {path: learn(head, progress=partial(self._say, "head"))[path].packed()}

    def _say(self, part: str, step: int, steps: int) -> None:
        self.work.say(f"{part} learns, step {step} of {steps}")

    def _keep(self, block: int, hidden: mx.array) -> None:
        """Keep what a block will read. What the block before it read is still needed: its layers
        aren't written yet.
        """
        write_tensors(self._file(block), {"hidden": hidden})
        self._file(block - 2).unlink(missing_ok=True)

    def _resume(self, runner: Runner, first: int | None) -> tuple[int, mx.array | None]:
        """The block to go on from, and what it reads: the last one at or before the one that is
        asked for.
        """
        depth = len(runner.trunk[runner.blocks])
        for block in range(depth if first is None else first, 0, -1):
            if self._file(block).is_file():
                return block, read_tensors(self._file(block))["hidden"]
        return 0, None

    def _file(self, block: int) -> Path:
        return self.work.folder / f"{SCRATCH}hidden-{block}.safetensors"
