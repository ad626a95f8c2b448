"""Falcon-H1's factors on attention, which mlx-lm's class folds into some of the weights only.

transformers multiplies the input of attention by one factor and the keys by another; the `sanitize`
of mlx-lm 0.32 folds the first into queries and keys, leaves out values, and never uses the second.
Both are folded here before it, and the result's config says that nothing is left to fold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

Table = dict[str, Any]
MODEL_TYPE = "falcon_h1"
KEYS, INPUTS = "key_multiplier", "attention_in_multiplier"
_CONVOLUTION = ".mamba.conv1d.weight"


def fold_multipliers(
    config: Mapping[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """The tensors with the factors that mlx-lm's class leaves out; others as they are.

    Args:
        config: of a model; only Falcon-H1's in transformers' layout are changed.
        weights: the tensors, before `sanitize`; nothing is evaluated.
    """
    if config.get("model_type") != MODEL_TYPE or not _is_unfolded(weights):
        return weights
    factors = {".k_proj.weight": config.get(KEYS, 1.0), ".v_proj.weight": config.get(INPUTS, 1.0)}
    return {name: _multiplied(name, array, factors) for name, array in weights.items()}


def folded(config: Table) -> Table:
    """The config of a model whose factors are in its weights."""
    if config.get("model_type") != MODEL_TYPE:
        return config
    return {key: 1.0 if key in (KEYS, INPUTS) else value for key, value in config.items()}


def is_left_out(config: Mapping[str, Any]) -> bool:
    """Whether a converted model's config says factors that its weights don't have."""
    converted = config.get("model_type") == MODEL_TYPE and "quantization" in config
    return converted and any(config.get(key, 1.0) != 1.0 for key in (KEYS, INPUTS))


def _is_unfolded(weights: Mapping[str, mx.array]) -> bool:
    """Whether the convolutions have transformers' layout, by which mlx-lm's `sanitize` decides."""
    shapes = [array.shape for name, array in weights.items() if name.endswith(_CONVOLUTION)]
    return bool(shapes) and shapes[0][-1] > shapes[0][1]


def _multiplied(name: str, array: mx.array, factors: Mapping[str, float]) -> mx.array:
    factor = next((value for end, value in factors.items() if name.endswith(end)), 1.0)
    return array if factor == 1.0 else array * factor
