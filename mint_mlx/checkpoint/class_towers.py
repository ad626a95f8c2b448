"""Tensors that a class of mlx-lm does not drop, so that stock loading fails: towers, and blocks for
multi-token prediction."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..base.hf_config import text_config
from .block_path import block_of
from .roles import TOWER


def without_towers(model: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors without those of towers that a model has no parameters for.

    Args:
        model: of mlx-lm.
        weights: the tensors by name, as its `sanitize` returns them.
    """
    rest = set(_unused_towers(model, weights))
    return {name: array for name, array in weights.items() if name not in rest}


def without_mtp(
    model: Any, config: dict[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """The tensors without those of blocks for multi-token prediction, which follow on the others.

    Each has an `eh_proj`. DeepSeek-V3's class of mlx-lm drops block 61 alone.

    Args:
        model: of mlx-lm.
        config: its config.json.
        weights: the tensors by name, as its `sanitize` returns them.
    """
    table = text_config(config)
    depth, more = (table.get(key) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    if not isinstance(depth, int) or not isinstance(more, int) or more < 1:
        return weights
    blocks = {block_of(name) for name in weights if ".eh_proj." in name}
    blocks &= set(range(depth, depth + more))
    rest = {name for name in weights if block_of(name) in blocks}
    rest -= {name for name, _ in tree_flatten(model.parameters())}
    return {name: array for name, array in weights.items() if name not in rest}


def drops_towers(model: Any, towers: Collection[str]) -> bool:
    """Whether stock mlx-lm loads a checkpoint that holds these tensors of towers too.

    Args:
        model: of mlx-lm.
        towers: the tensors' names.
    """
    arrays = {name: mx.zeros(1) for name in towers}
    sanitize = getattr(model, "sanitize", lambda weights: weights)
    try:
        with mx.stream(mx.cpu):
            return not any(_unused_towers(model, sanitize(arrays)))
    except (KeyError, ValueError, AttributeError, IndexError, TypeError):
        return True  # it looks for tensors of the text model: verifying the result will tell


def _unused_towers(model: Any, names: Iterable[str]) -> list[str]:
    towers = [name for name in names if TOWER.search(name)]
    if not towers:
        return []
    parameters = {name for name, _ in tree_flatten(model.parameters())}
    return [name for name in towers if name not in parameters]
