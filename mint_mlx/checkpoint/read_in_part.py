"""Values that mlx-lm's classes read, and don't go by wherever transformers does.

Shapes fit, and another model runs. Each was seen beside transformers 4.57 and 5, with tensors drawn
at random.
"""

from __future__ import annotations

from typing import Any

from .model_classes import ModelClass

Table = dict[str, Any]
# How many groups a Mamba layer has: the norm before its output goes by them, mlx-lm's by none. (So
# does transformers 4.57 without kernels; mamba_ssm, by which such models are trained, doesn't.)
GROUPS = {"falcon_h1": "mamba_n_groups", "granitemoehybrid": "mamba_n_groups", "mamba2": "n_groups"}
# What Granite's layers may have: of other words transformers makes none, mlx-lm rotary ones.
POSITIONS = ("rope", "nope", None)
# Falcon-H1's factors are folded into weights, but not into biases.
BIASES = ("attention_bias", "mamba_proj_bias", "mlp_bias", "projectors_bias")


def read_in_part(table: Table, reader: ModelClass) -> list[tuple[str, Any]]:
    """The keys of a text model's table whose values its class doesn't go by everywhere."""
    keys = []
    groups = GROUPS.get(reader.name, "")
    if _above_one(table.get(groups)) and _norms_groups(table, reader):
        keys.append(groups)
    if reader.name == "gpt_bigcode" and table.get("multi_query") is False:
        keys.append("multi_query")  # each head's query, key and value lie together
    if reader.name == "granitemoehybrid" and table.get("position_embedding_type") not in POSITIONS:
        keys.append("position_embedding_type")
    if reader.name == "falcon_h1" and _has_factors(table):
        keys += [key for key in BIASES if table.get(key)]
    return [(key, table[key]) for key in keys]


def _norms_groups(table: Table, reader: ModelClass) -> bool:
    if reader.name == "falcon_h1":
        return bool(table.get("mamba_rms_norm"))
    return reader.name == "mamba2" or "mamba" in (table.get("layer_types") or ())


def _has_factors(table: Table) -> bool:
    values = (value for key, value in table.items() if key.endswith(("multiplier", "multipliers")))
    return any(value not in (None, 1, [1] * 2, [1] * 5) for value in values)


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1
