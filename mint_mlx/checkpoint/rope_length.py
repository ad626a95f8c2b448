"""The context that scaled positions were trained at, where a config leaves it out.

transformers takes the model's whole context for it, and mlx-lm's rope a number of its own.
"""

from __future__ import annotations

from typing import Any

from .model_classes import ModelClass
from .rope_keys import rope_type

Table = dict[str, Any]
LENGTH = "original_max_position_embeddings"
# What mlx-lm's rope takes instead, by the kind of scaling; None where it can't do without.
INSTEAD = {"deepseek_yarn": 4096, "llama3": 8192, "longrope": None, "yarn": 4096}
TABLES = ("rope_scaling", "rope_parameters")  # where a class looks for the scaling


def rope_length(table: Table, reader: ModelClass) -> Table:
    """The tables of positions that the class reads, with the context that they leave out."""
    original = table.get(LENGTH) or table.get("max_position_embeddings")
    added = {}
    for name in TABLES:
        stated = table.get(name)
        if name not in reader.keys or not isinstance(stated, dict) or not original:
            continue
        whole = _with_length(stated, original) | {
            layers: _with_length(inner, original)
            for layers, inner in stated.items()
            if isinstance(inner, dict)
        }
        if whole != stated:
            added[name] = whole
    return added


def added_length(before: Any, after: Any) -> tuple[Any, Any] | None:
    """The context that `rope_length` added, and what mlx-lm would have taken.

    None where anything else was changed too.
    """
    if not isinstance(before, dict) or not isinstance(after, dict) or before.get(LENGTH):
        return None
    if LENGTH not in after or after != before | {LENGTH: after[LENGTH]}:
        return None
    return after[LENGTH], INSTEAD[rope_type(before)]


def _with_length(stated: Table, original: Any) -> Table:
    """Parameters of one type of layer, with the context where it is left out."""
    if rope_type(stated) not in INSTEAD or stated.get(LENGTH):
        return stated
    return stated | {LENGTH: original}
