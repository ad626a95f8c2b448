"""Reads gpt-oss as its fine-tunes are saved: experts fused in bf16, or as single linear layers.

transformers writes all experts of a block as (experts, inputs, outputs). Tools that quantize or
train linear layers alone give each expert layers of its own: `experts.gate_up_projs.3` with gate
and up interleaved (unsloth), or `experts.3.gate_proj` (llm-compressor). mlx-lm 0.32 reads the
released MXFP4 layout only; this file gives all of them mlx-lm's names.
"""

from __future__ import annotations

from collections import defaultdict

import mlx.core as mx

from .tensor_names import numbered

Weights = dict[str, mx.array]
FUSED = "experts.gate_up_proj"
KINDS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def read_experts(weights: Weights) -> Weights:
    """The tensors under mlx-lm's names, (experts, outputs, inputs); any other layout unchanged."""
    return _split_fused(_stack_single(weights))


def _stack_single(weights: Weights) -> Weights:
    """The tensors with single experts stacked, where all of a kind are there."""
    rest: Weights = {}
    groups: dict[tuple[str, str, str], dict[int, mx.array]] = defaultdict(dict)
    for name, array in weights.items():
        match name.rsplit(".", 3):
            case [base, first, second, leaf] if base.endswith(".experts"):
                kind, number = numbered(first, second)
                if number is not None and kind in KINDS:
                    groups[base, kind, leaf][number] = array
                    continue
        rest[name.replace(".router.linear.", ".router.")] = array

    if any(sorted(experts) != list(range(len(experts))) for experts in groups.values()):
        return weights
    for (base, kind, leaf), experts in groups.items():
        arrays = [experts[number] for number in range(len(experts))]
        if kind != "gate_up_proj":
            rest[f"{base}.{kind}.{leaf}"] = mx.stack(arrays)
            continue
        for half, start in (("gate_proj", 0), ("up_proj", 1)):
            rest[f"{base}.{half}.{leaf}"] = mx.stack([array[start::2] for array in arrays])
    return rest


def _split_fused(weights: Weights) -> Weights:
    """The tensors with fused experts split: gate and up are interleaved along the outputs."""
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
