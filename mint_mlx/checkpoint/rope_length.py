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
    added = {}
    for name in TABLES:
        stated = table.get(name)
        if name not in reader.keys or not isinstance(stated, dict):
            continue
        whole = _with_length(stated, table) | {
            layers: _with_length(inner, table)
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


def _with_length(stated: Table, table: Table) -> Table:
    """Parameters of one type of layer, with the context where they leave it out.

    Only longrope's families state it beside its parameters.
    """
    kind = rope_type(stated)
    if kind not in INSTEAD or stated.get(LENGTH):
        return stated
    beside = table.get(LENGTH) if kind == "longrope" else None
    original = beside or table.get("max_position_embeddings")
    return stated | {LENGTH: original} if original else stated
