"""Whether the values of a config.json can be a model's: numbers, tables, lists of some length.

mlx-lm's classes take what is there, and fail with whatever Python says of it, or only when the
model is run. Here the key is named.
"""

from __future__ import annotations

import json
import math
from typing import Any

from ..base.errors import MintError
from ..base.hf_config import config_tables, text_config
from .key_names import ALIASES
from .model_classes import text_class

Table = dict[str, Any]
EXPERTS, CHOSEN, DEPTHS = ALIASES[0], ALIASES[1], ALIASES[-1]
# Families in which transformers wants one of `layer_types` for each layer, and no more.
LISTED = {
    "cohere2",
    "exaone4",
    "gemma3_text",
    "gemma4_text",
    "gpt_oss",
    "lfm2",
    "olmo3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
}
# Numbers that a model can't do without.
SIZES = ("hidden_size", "num_attention_heads", "vocab_size", *DEPTHS)
TABLES = ("rope_scaling", "rope_parameters")


def check_values(config: Table) -> None:
    """Refuse a config that holds a value which no model has.

    Args:
        config: as it stands in the file, or as `config_keys.adapt` brings it.

    Raises:
        MintError: naming the key, its value and what was expected.
    """
    for table in config_tables(config):
        _check_numbers(table)
        for key in TABLES:
            if table.get(key) and not isinstance(table[key], dict):
                raise _refusal(key, table[key], "a table")
        for key in SIZES:
            value = table.get(key)
            if value is not None and not _is_count(value) and not isinstance(value, list):
                raise _refusal(key, value, "a whole number of at least 1")
    table, reader = text_config(config), text_class(config)
    for key in sorted(reader.numbers & table.keys()) if reader else ():
        needed = reader is not None and key in reader.required
        if isinstance(table[key], str) or (needed and table[key] is None and key in SIZES):
            raise _refusal(key, table[key], "a number")
    _check_layer_types(table)
    _check_positions(table)
    _check_experts(table)


def _check_numbers(table: Table) -> None:
    """Refuse NaN, which Python's JSON knows and no model computes with."""
    for key, value in table.items():
        if isinstance(value, dict):
            _check_numbers(value)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and math.isnan(item):
                raise _refusal(key, value, "a number")


def _is_count(value: Any) -> bool:
    """Whether a value is a whole number above zero (JSON may have written it as 2.0)."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0 < value
    )


def _check_layer_types(table: Table) -> None:
    """Refuse types of layers that aren't a list, or one that ends before the layers do.

    It may go on where a family lists the blocks for multi-token prediction too.
    """
    types = table.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or not all(isinstance(name, (str, int)) for name in types):
        raise _refusal("layer_types", types, "a list of names")
    depth = next((table[key] for key in DEPTHS if _is_count(table.get(key))), 0)
    too_many = table.get("model_type") in LISTED and len(types) > depth > 0
    if types and (len(types) < depth or too_many):
        raise MintError(
            f"config.json lists {len(types)} layer_types for {depth} layers: download it again, or "
            "correct it"
        )


def _check_positions(table: Table) -> None:
    """Refuse positions of some types of layers and not of others: transformers has defaults."""
    parameters, types = table.get("rope_parameters") or {}, table.get("layer_types") or ()
    apart = {name for name, value in parameters.items() if isinstance(value, dict)}
    missing = sorted({"full_attention", "sliding_attention"} & set(types) - apart)
    if apart and missing:
        expected = f"a table for each type of layer ({missing[0]} has none)"
        raise _refusal("rope_parameters", parameters, expected)


def _check_experts(table: Table) -> None:
    """Refuse more chosen experts than there are."""
    counts = [(key, table[key]) for key in EXPERTS if _is_count(table.get(key))]
    chosen = [(key, table[key]) for key in CHOSEN if _is_count(table.get(key))]
    if not counts or not chosen:
        return
    most = max(count for _, count in counts)
    key, value = chosen[0]
    if value > most > 1:
        raise _refusal(key, value, f"at most {most}, the number of experts")


def _refusal(key: str, value: Any, expected: str) -> MintError:
    text = json.dumps(value)
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return MintError(
        f"config.json says {key} is {short}, which is not {expected}: download it again, or "
        "correct it"
    )
