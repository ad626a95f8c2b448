"""What each layer is, under the keys and names that mlx-lm's classes read."""

from __future__ import annotations

from typing import Any

from .model_classes import ModelClass

Table = dict[str, Any]
# What transformers calls layers since 5.16, and before.
EARLIER = {"linear_attention": "mamba", "full_attention": "attention"}


def layer_type_keys(table: Table, reader: ModelClass) -> Table:
    """`layer_types` and `mlp_layer_types` by the names and keys that the class reads."""
    return _attention(table, reader) | _feed_forward(table, reader)


def _attention(table: Table, reader: ModelClass) -> Table:
    """`layer_types` by names that the class knows, or as the period that it reads instead."""
    types = table.get("layer_types")
    if not isinstance(types, list) or not types:
        return {}
    if "layer_types" in reader.keys:
        renamed = [_renamed(name, reader) for name in types]
        return {"layer_types": renamed} if renamed != types else {}

    added: Table = {}
    every = period(types)
    for key in ("sliding_window_pattern", "full_attention_interval"):
        stated = table.get(key, reader.defaults.get(key))
        if key in reader.keys and not isinstance(stated, str) and every not in (None, stated):
            added[key] = every
    return added


def _feed_forward(table: Table, reader: ModelClass) -> Table:
    """How many of the first layers have no experts."""
    types = table.get("mlp_layer_types")
    key = "first_k_dense_replace"
    if not isinstance(types, list) or key not in reader.keys or table.get(key) is not None:
        return {}
    dense = [name == "dense" for name in types]
    first = sum(dense)
    fits = dense == [True] * first + [False] * (len(dense) - first)
    return {key: first} if fits and first != reader.defaults[key] else {}


def period(types: list[Any]) -> int | None:
    """Every how many layers one has full attention, all others something else; None without rule.

    A model of nothing but other layers has a period beyond its depth.
    """
    full = [i + 1 for i, name in enumerate(types) if name == "full_attention"]
    every = full[0] if full else len(types) + 1
    return every if full == list(range(every, len(types) + 1, every)) else None


def _renamed(name: Any, reader: ModelClass) -> Any:
    """A type of layer by the name that stands in the class's module."""
    earlier = EARLIER.get(name)
    if earlier is None or reader.says(name) or not reader.says(earlier):
        return name
    return earlier
