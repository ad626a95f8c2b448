"""Routers that rule out groups of experts: biases are shifted so that mlx-lm rules them out too.

Where `topk_group` is below `n_group`, such a router chooses among the experts of the best groups
alone. mlx-lm gives all others a score of 0, transformers 5 none: once a score with its bias is
below 0, mlx-lm takes an expert of a group that was ruled out. Scores without bias are above 0, and
a constant added to all biases of a router changes no order: with none below 0 both do the same.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

Table = dict[str, Any]
# Classes with DeepSeek-V3's way to choose experts, of which each has a copy.
RELATIVES = {
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_linear",
    "kimi_vl",
    "mimo_v2_flash",
    "nemotron_h",
    "solar_open",
}
# Classes that score what is ruled out as 0.
CLASSES = RELATIVES | {"bailing_moe", "bailing_moe_linear", "kimi_k3"}
GROUPS = ("n_group", "num_expert_group")
BIASES = ("correction_bias", "expert_bias")  # how their names end
# So far below the largest bias an expert is switched off: scores without bias are below 1.
OFF = 64.0


def rules_out_by_zero(name: str, table: Table) -> bool:
    """Whether a class of mlx-lm scores experts that are ruled out as 0.

    Args:
        name: of the class.
        table: its text model's part of config.json.
    """
    groups = max((n for key in GROUPS if isinstance(n := table.get(key), int)), default=1)
    return name in CLASSES and 0 < (table.get("topk_group") or 0) < groups


def shift_biases(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors with each router's biases shifted, in float32, so that none is below 0.

    Experts that are switched off (a bias of -1e9) come first to just below all others, and groups
    that hold one of them with them: beside such a number the others would be one and the same.
    """
    return {
        name: _shifted(array) if name.endswith(BIASES) else array for name, array in weights.items()
    }


def _shifted(bias: mx.array) -> mx.array:
    exact = bias.astype(mx.float32)
    largest = exact.max()
    on = exact >= largest - OFF
    # Below what any two that are on add up to, also with the largest beside it.
    below = 2 * mx.where(on, exact, largest).min() - largest - 3
    near = mx.where(on, exact, below)
    return near + mx.maximum(-near.min(), 0)
