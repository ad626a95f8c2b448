"""Tensors of a larger model's text part that was saved alone: by the names of the whole model.

transformers saves the text class of a model with a tower by names without the text model's prefix,
and Qwen3.5's experts one by one. What mlx-lm's `sanitize` doesn't rename is renamed here, before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import mlx.core as mx

# What stands in place of `model.` in the whole model, by its `model_type`.
PREFIXES = {
    "gemma3n": "model.language_model.",
    "gemma4_unified": "language_model.model.",
    "llama4": "language_model.model.",
    "minimax_m3_vl": "language_model.model.",
    "muse_spark": "model.language_model.",
    "qwen3_5_moe": "language_model.model.",
    "qwen3_vl_moe": "language_model.model.",
}
_BARE = re.compile(r"model\.(layers|embed_tokens|norm)\.")


def is_bare(names: Any) -> bool:
    """Whether tensors are named as in a text model alone."""
    return any(_BARE.match(name) for name in names)


def whole_names(model_type: str, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Tensors by the names of the whole model that mlx-lm's class expects."""
    prefix = PREFIXES[model_type]
    if not is_bare(weights):
        return weights
    head = prefix.removesuffix("model.")
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("model."):
            renamed[prefix + name.removeprefix("model.")] = tensor
        else:
            renamed[name if head == prefix else head + name] = tensor
    return _stacked(renamed) if model_type == "qwen3_5_moe" else renamed


def _stacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts that come one by one as mlx-lm's stacks of them."""
    experts: dict[str, dict[int, mx.array]] = defaultdict(dict)
    others = {}
    for name, tensor in weights.items():
        block, _, rest = name.partition(".mlp.experts.")
        expert, _, projection = rest.partition(".")
        if expert.isdigit():
            experts[f"{block}.mlp.switch_mlp.{projection}"][int(expert)] = tensor
        else:
            others[name] = tensor
    stacks = {name: mx.stack([t[i] for i in sorted(t)]) for name, t in experts.items()}
    return others | stacks
