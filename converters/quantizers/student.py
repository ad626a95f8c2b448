"""The checkpoint that is distilled: its predictions with other scales and biases (distil.py)."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ...base.errors import MintError
from ...base.safetensors_header import read_folder
from ...checkpoint import mlxlm
from ...runtime.device import on_cpu
from ...runtime.fast_math import fast_math
from ...runtime.runner import load_runner, logits_of, trunk_output
from .learn_block import moved

Params = dict[str, dict[str, mx.array]]  # by layer, then by name


class Student:
    """A checkpoint whose scales and biases can change.

    On a CPU its layers are dense, and computed anew from their codes at each step.
    """

    def __init__(self, folder: Path) -> None:
        self.runner = load_runner(folder, False)
        self.runner.model.train()
        self.modules: dict[str, nn.Module] = dict(self.runner.model.named_modules())
        self.stored = {
            path: module
            for path, module in mlxlm.build_model(folder).named_modules()
            if "scales" in module and module.get("biases") is not None
        }
        self.start = {
            path: {name: module[name].astype(mx.float32) for name in ("scales", "biases")}
            for path, module in self.stored.items()
        }
        if not self.stored:
            raise MintError(
                f"{folder.name} has no layer with scales and biases: there is nothing to refine"
            )

    def check_names(self, folder: Path) -> None:
        """Refuse a checkpoint that stores its scales in another form than mlx-lm's modules have.

        Raises:
            MintError: naming the first such tensor.
        """
        sizes = {
            name: t.end - t.start
            for table in read_folder(folder).values()
            for name, t in table.items()
        }
        for path, module in self.stored.items():
            for name in ("scales", "biases"):
                if sizes.get(f"{path}.{name}") != module[name].nbytes:
                    raise MintError(
                        f"{folder.name} doesn't store {path}.{name} as mlx-lm names it: only "
                        "checkpoints that mlx-lm or mint-mlx wrote can be refined"
                    )

    def moved(self, params: Params) -> Params:
        """Scales and biases after their offsets, rounded to the types that they are stored in."""
        out: Params = {}
        for path, offsets in params.items():
            dtype = self.stored[path]["scales"].dtype
            start = self.start[path]
            scales, biases = moved(start["scales"], start["biases"], offsets, dtype)
            out[path] = {"scales": scales, "biases": biases}
        return out

    def logits(self, params: Params, tokens: mx.array) -> mx.array:
        """The checkpoint's predictions with these offsets, float32."""
        for path, new in self.moved(params).items():
            stored = self.stored[path]
            module = self.modules[path]
            if on_cpu():
                module.weight = mx.dequantize(
                    stored.weight, new["scales"], new["biases"], stored.group_size, stored.bits
                )
            else:
                module.scales = new["scales"].astype(stored["scales"].dtype)
                module.biases = new["biases"].astype(stored["biases"].dtype)
        with fast_math(self.runner.model):
            return logits_of(self.runner, tokens, trunk_output(self.runner, tokens))
