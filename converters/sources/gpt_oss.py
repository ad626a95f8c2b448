"""gpt-oss fine-tunes in bf16: transformers keeps all experts of a block in fused tensors of
(experts, inputs, outputs).

mlx-lm 0.32 reads the released MXFP4 layout only; this brings the fused one to its names.
"""

from __future__ import annotations

import mlx.core as mx

FUSED = "experts.gate_up_proj"


def split_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors under mlx-lm's names, (experts, outputs, inputs); anything but the fused layout
    as it is.

    Gate and up are interleaved along the outputs, in weight and bias alike.
    """
    if not any(name.endswith(FUSED) for name in weights):
        return weights
    made = {}
    for name, array in weights.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            rows = array.swapaxes(-1, -2)
            made[f"{base}.gate_proj.weight"] = mx.contiguous(rows[:, ::2])
            made[f"{base}.up_proj.weight"] = mx.contiguous(rows[:, 1::2])
        elif leaf == "gate_up_proj_bias":
            made[f"{base}.gate_proj.bias"] = mx.contiguous(array[:, ::2])
            made[f"{base}.up_proj.bias"] = mx.contiguous(array[:, 1::2])
        elif leaf == "down_proj" and base.endswith("experts"):
            made[f"{name}.weight"] = mx.contiguous(array.swapaxes(-1, -2))
        elif leaf == "down_proj_bias":
            made[f"{base}.down_proj.bias"] = array
        else:
            made[name] = array
    return made
