"""Runs a model's forward pass for measuring: in its own types on a GPU, densely in float32 on a CPU.

MLX's CPU backend has no fast quantized matrix product, and its `gather_mm` takes float32 only. So on a CPU every
quantized weight is dequantized once, and the tokens of each expert are gathered and multiplied with one dense product
(several times faster than `gather_mm`). This file holds all that is patched of mlx-lm's modules.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear


class GroupedSwitchLinear(SwitchLinear):
    """A SwitchLinear that multiplies each expert's tokens with one dense product."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As SwitchLinear: x (..., 1, in) broadcast against indices (..., k); returns (..., k, 1, out)."""
        lead = indices.shape
        rows = mx.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, x.shape[-1])
        expert = np.asarray(indices).reshape(-1)
        order = None if sorted_indices else np.argsort(expert, kind="stable")
        if order is not None:
            rows, expert = rows[mx.array(order)], expert[order]
        edges = np.searchsorted(expert, np.arange(self.weight.shape[0] + 1))
        weight, bias = self["weight"], self.get("bias")
        parts = []
        for e in np.unique(expert).tolist():
            part = rows[int(edges[e]) : int(edges[e + 1])] @ weight[e].T
            parts.append(part if bias is None else part + bias[e])
        out = mx.concatenate(parts) if parts else mx.zeros((0, weight.shape[1]), rows.dtype)
        if order is not None:
            out = out[mx.array(np.argsort(order, kind="stable"))]
        return out.reshape(*lead, 1, -1)


def prepare(model: nn.Module) -> nn.Module:
    """Make a loaded model ready to be measured on this device; changes it in place.

    On a GPU it stays as users run it. On a CPU it becomes dense float32, module by module.
    """
    if mx.default_device() == mx.gpu:
        return model
    dense = []
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if "weight" in module:
            replacement = _dense(module)
            mx.eval(replacement.parameters())
            if replacement is not module:
                dense.append((path, replacement))
    model.update_modules(tree_unflatten(dense))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def _restore(module: Any) -> mx.array:
    """The weight of a quantized module in float32, as MLX's matrix products see it (they never round it to bf16)."""
    scales, biases = module.scales, module.get("biases")
    if module.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        module.weight, scales, biases, module.group_size, module.bits, mode=module.mode, dtype=mx.float32
    )


def _dense(module: Any) -> Any:
    kind = type(module).__name__
    weight = _restore(module) if "scales" in module else module.weight
    target = {
        "QuantizedLinear": nn.Linear,
        "QuantizedEmbedding": nn.Embedding,
        "QuantizedMultiLinear": MultiLinear,
        "QuantizedSwitchLinear": GroupedSwitchLinear,
        "SwitchLinear": GroupedSwitchLinear,
    }.get(kind)
    if target is None:
        return module
    new = target.__new__(target)
    nn.Module.__init__(new)
    new.weight = weight.astype(mx.float32)
    if "bias" in module:
        new.bias = module.bias.astype(mx.float32)
    return new
