"""Runs error feedback over a model, which makes up for the errors of all layers before (walk.py).

A block runs on all windows at once. Each layer is quantized when it is called, by what it is called
with, and goes on with its codes: one run shows every layer what the quantized model will feed it.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ...base.quant_config import QuantConfig
from ...runtime import patching
from ...runtime.blocks import call_block
from ...runtime.runner import Runner, make_dense
from ...runtime.taps import Activations, reading
from . import gptq
from .drift import Drift
from .inputs import head_rows, weigh
from .walk import Packed, Walk, WalkedBlock


class Follower(Walk):
    """A quantizer that feeds errors back, also those of the blocks before."""

    def quantize_other(self, weight: mx.array, config: QuantConfig) -> Packed:
        """As `Walk`."""
        return gptq.quantize(weight, config, searched=True)

    def quantize_block(self, block: WalkedBlock) -> tuple[dict[str, Packed], mx.array]:
        """As `Walk`."""
        modules, activations = block.modules, block.activations
        paths = {id(module): path for path, module in modules.items()}
        packed: dict[str, Packed] = {}

        def quantized(module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            path = paths[id(module)]
            if path not in packed:
                drifted = reads(path, module, x, *args, **kwargs) if path in activations else None
                packed[path] = self._quantize(path, module, activations.pop(path, None), drifted)
                self.put(path, module, packed[path])
            return cast(mx.array, module(x, *args, **kwargs))

        with reading() as reads, patching.layers_run_by(modules.values(), quantized):
            out = call_block(block.step, block.hidden)
            mx.eval(out)
        for path in modules.keys() - packed.keys():  # it was never called
            packed[path] = self._quantize(path, modules[path], None, None)
        return packed, out

    def quantize_head(self, runner: Runner, out: mx.array, hidden: mx.array) -> dict[str, Packed]:
        """As `Walk`."""
        heads = [path for path in self.changed("head", None) if path in self.sensitivity.weights]
        if not heads:
            return {}
        (path,) = heads
        source, drifted = (head_rows(runner, path, self.tokens, last) for last in (out, hidden))
        module = make_dense(runner, heads)[path]
        return {path: self._quantize(path, module, [source], drifted)}

    def _quantize(
        self,
        path: str,
        module: nn.Module,
        source: list[Activations] | None,
        drifted: Activations | None,
    ) -> Packed:
        """One layer.

        Args:
            path: the layer.
            module: it, dense.
            source, drifted: what it reads in the source and behind quantized blocks; None where
                that isn't followed.
        """
        weight, config = self.weight(path, module), self.work.choice[path]
        on_grid = self.grid_codes(path, weight)
        if on_grid is not None:
            return on_grid
        if source is None or drifted is None:
            return self.quantize_other(weight, config)

        experts = {path: self.layers[path].experts}
        is_called_once = sum(len(batch.token) for batch in source) == len(drifted.token)
        if experts[path] == 1 and not is_called_once:  # nobody knows which row belongs to which
            inputs = weigh({path: source}, self.sensitivity, experts)[path]
            return gptq.quantize(weight, config, inputs, searched=True)
        inputs = weigh({path: [drifted]}, self.sensitivity, experts)[path]
        return gptq.quantize(weight, config, inputs, True, Drift(source, drifted, inputs))
