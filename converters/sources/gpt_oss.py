"""Reads gpt-oss fine-tunes in bf16, which hold all experts of a block in fused tensors.

transformers writes them as (experts, inputs, outputs); mlx-lm 0.32 reads the released MXFP4 layout
only. This file splits the fused tensors and gives them mlx-lm's names.
"""

from __future__ import annotations

import mlx.core as mx

FUSED = "experts.gate_up_proj"


def split_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors under mlx-lm's names, (experts, outputs, inputs); any other layout unchanged.

    Gate and up are interleaved along the outputs, in weight and bias alike.
    """
    if not any(name.endswith(FUSED) for name in weights):
        return weights
    tensors = {}
    for name, array in weights.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            rows = array.swapaxes(-1, -2)
            tensors[f"{base}.gate_proj.weight"] = mx.contiguous(rows[:, ::2])
            tensors[f"{base}.up_proj.weight"] = mx.contiguous(rows[:, 1::2])
        elif leaf == "gate_up_proj_bias":
            tensors[f"{base}.gate_proj.bias"] = mx.contiguous(array[:, ::2])
            tensors[f"{base}.up_proj.bias"] = mx.contiguous(array[:, 1::2])
        elif leaf == "down_proj" and base.endswith("experts"):
            tensors[f"{name}.weight"] = mx.contiguous(array.swapaxes(-1, -2))
        elif leaf == "down_proj_bias":
            tensors[f"{base}.down_proj.bias"] = array
        else:
            tensors[name] = array
    return tensors
