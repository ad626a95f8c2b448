"""Runs `learn` over a model, a block at a time (walk.py).

The source's block gives the inputs' moments (for the start) and the target; the quantized blocks
before it give what the block will really read.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ...base.quant_config import QuantConfig
from ...runtime.blocks import call_block, run
from ...runtime.divergence import mean_kl
from ...runtime.runner import LOGITS, Runner, logits_of, make_dense, trunk_output_from
from ...runtime.taps import Activations
from . import gptq, rtn
from .codes import Codes
from .inputs import Inputs, head_inputs, weigh
from .learn_block import Block, learn, metric_cost, metric_root
from .learn_turns import learn_in_turns
from .memory_estimate import learns_head, turns
from .protocol import Work
from .walk import BATCH, Packed, Walk, WalkedBlock


class Learner(Walk):
    """A quantizer that learns a block when the first of its layers is asked for."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.turns = turns(work.inventory, self.tokens.size)

    def quantize_other(self, weight: mx.array, config: QuantConfig) -> Packed:
        """As `Walk`."""
        return rtn.quantize(weight, config)

    def quantize_block(self, block: WalkedBlock) -> tuple[dict[str, Packed], mx.array]:
        """As `Walk`."""
        packed, start = self._begin(block.modules, block.activations)
        for path in packed.keys() - start.keys():
            self.put(path, block.modules[path], packed[path])
        if start:
            packed |= self._learned(block, start)
        for path in start:
            self.put(path, block.modules[path], packed[path])
        return packed, run(block.step.with_input(block.hidden), BATCH)

    def _learned(self, walked: WalkedBlock, start: dict[str, Codes]) -> dict[str, Packed]:
        """The layers that are learned; `start` are their codes before."""
        modules, index = walked.modules, walked.step.index
        block = Block(
            call=partial(call_block, walked.step),
            modules={path: modules[path] for path in start},
            exact={path: modules[path].weight for path in start},
            start=start,
            # 16 bits would drown the errors of layers of 6 and 8 bits.
            inputs=walked.hidden.astype(mx.float32),
            targets=walked.out.astype(mx.float32),
            cost=partial(metric_cost, metric_root(self.sensitivity.metric[index])),
        )
        learned = learn_in_turns(
            block,
            [path for path in start if self.layers[path].kind == "experts"],
            self.turns,
            partial(self._put_codes, modules),
            index,
            partial(self._say, f"block {index}", index),
        )
        return {path: codes.packed() for path, codes in learned.items()}

    def _put_codes(self, modules: dict[str, nn.Module], path: str, codes: Codes) -> None:
        self.put(path, modules[path], codes.packed())

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
            weight = self.weight(path, module)
            config = self.work.choice[path]
            on_grid = self.grid_codes(path, weight)
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

    def quantize_head(self, runner: Runner, out: mx.array, hidden: mx.array) -> dict[str, Packed]:
        """As `Walk`: so that predictions from the quantized blocks' output stay the source's."""
        inputs = head_inputs(runner, self.work.inventory, out, self.sensitivity)
        if not inputs:
            return {}
        ((path, moments),) = inputs.items()
        module = make_dense(runner, inputs)[path]
        config = self.work.choice[path]
        on_grid = self.grid_codes(path, self.weight(path, module))
        if on_grid is not None:
            return {path: on_grid}
        if config.mode != "affine":
            return {path: gptq.quantize(self.weight(path, module), config, moments, True)}

        start = gptq.find_codes(self.weight(path, module), config, moments, searched=True)
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

        # Of zeros both have the same predictions: nothing is learned from those within prompts.
        counted = self.sensitivity.text.counted
        if not counted.all():
            counts = mx.array(counted)[..., None]
            top, target = (mx.where(counts, array, 0) for array in (top, target))
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
