"""What mlx-lm's classes compute otherwise than transformers, whatever their config says.

A closed list: no key brings these over, and none of them makes the model useless. They are told
where a model is converted, scored or examined, so that nobody takes them for a loss of bits.
"""

from __future__ import annotations

import math
from typing import Any

from ..base.hf_config import text_config
from ..converters.sources.group_limits import RELATIVES
from ..converters.sources.multipliers import is_left_out
from .bad_value import MALFORMED
from .model_classes import ModelClass, text_class
from .rope_keys import by_layer, is_scaled, rope_type
from .router_keys import SUMS

Table = dict[str, Any]
# Classes that attend to everything where their family's layers have sliding windows.
WITHOUT_WINDOWS = {
    "dots1",
    "gemma2",
    "llama",
    "ministral3",  # unless its config has layer_types, which transformers doesn't read
    "mixtral",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "starcoder2",
}
# Classes that leave the weight of a single chosen expert as it is, where transformers makes it 1.
ONE_EXPERT_WEIGHS = RELATIVES | {"afmoe"}
EXPERTS_CHOSEN = ("num_experts_per_tok", "num_experts_per_token")


def known_differences(config: Table) -> list[str]:
    """A sentence for each known difference of a model, with what it costs where that is known.

    Args:
        config: as `config_keys.adapt` brings it.
    """
    reader = text_class(config)
    if reader is None:
        return []
    try:
        return _differences(text_config(config), reader)
    except MALFORMED:  # who builds the model says so
        return []


def _differences(table: Table, reader: ModelClass) -> list[str]:
    """The sentences for a text model's table."""
    sentences = [*_positions(table, reader), *_experts(table, reader), *_windows(table, reader)]
    sentences += _logits(table, reader)
    if is_left_out(table):
        sentences.append(
            "mlx-lm's own conversions of Falcon-H1 leave out key_multiplier and, in values, "
            "attention_in_multiplier: another model; convert the original"
        )
    if reader.name == "mimo_v2_flash":
        sentences.append("mlx-lm's sliding windows of MiMo are one token shorter")
    if reader.name == "granitemoehybrid" and _has_mamba(table) and "time_step_limit" not in table:
        sentences.append(
            "mlx-lm makes Granite's time steps at least 0.001 and at most 100, transformers lets "
            "them be as they are: no difference unless a step is shorter, and such a step adds "
            "next to nothing"
        )
    shortest = table.get("time_step_min")
    if reader.name == "nemotron_h" and isinstance(shortest, (int, float)) and shortest > 0:
        sentences.append(
            f"mlx-lm lets time steps below {shortest:g} be as short as they are, transformers "
            "makes them that long: no difference unless a step is shorter"
        )
    return sentences


def _has_mamba(table: Table) -> bool:
    """Whether any layer has time steps."""
    return bool({"mamba", "linear_attention"} & set(table.get("layer_types") or []))


def _positions(table: Table, reader: ModelClass) -> list[str]:
    """Differences in long contexts' positions."""
    key = "rope_parameters" if "rope_parameters" in reader.keys else "rope_scaling"
    scaling = table.get(key) or table.get("rope_scaling")
    full = by_layer(scaling)[0] if isinstance(scaling, dict) else {}
    if not is_scaled(full):
        return []

    kind = rope_type(full)
    if kind in ("longrope", "su") and full.get("short_factor") != full.get("long_factor"):
        original = full.get("original_max_position_embeddings") or table.get(
            "original_max_position_embeddings"
        )
        up_to = f"up to {original:,} tokens" if isinstance(original, int) else "in short contexts"
        return [
            f"mlx-lm takes longrope's long factors at every length, transformers its short ones "
            f"{up_to}: texts of that length get a little worse, not by the quantization"
        ]
    if kind == "yarn" and full.get("truncate") is False:
        cost = _truncation_cost(table, full)
        by = f" (by up to {cost:.0%})" if cost else ""
        return [
            f"mlx-lm rounds the ends of YaRN's ramp to whole dimensions, where config.json says "
            f"truncate: false: some frequencies of positions differ{by}"
        ]
    return []


def _truncation_cost(table: Table, scaling: Table) -> float | None:
    """How far the frequencies with and without rounded ends differ at most, as a share."""
    try:
        size = table.get("qk_rope_head_dim") or table.get("head_dim")
        size = size or table["hidden_size"] // table["num_attention_heads"]
        size = int(size * (scaling.get("partial_rotary_factor") or 1))
        theta = scaling.get("rope_theta") or table["rope_theta"]
        exact, rounded = (_yarn(size, theta, scaling, truncate) for truncate in (False, True))
        return max(abs(a / b - 1) for a, b in zip(exact, rounded, strict=True))
    except MALFORMED:
        return None


def _yarn(size: int, theta: float, scaling: Table, truncate: bool) -> list[float]:
    """YaRN's frequencies, as transformers computes them."""
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    frequencies = []
    for i in range(size // 2):
        ramp = min(max((i - low) / ((high - low) or 0.001), 0), 1)
        plain = theta ** (-2 * i / size)
        frequencies.append(plain / factor * ramp + plain * (1 - ramp))
    return frequencies


def _experts(table: Table, reader: ModelClass) -> list[str]:
    """Routers that mlx-lm's classes run otherwise."""
    if reader.name == "ernie4_5_moe" and table.get("moe_use_aux_free") is not False:
        return [
            "mlx-lm drops ERNIE's e_score_correction_bias: where it isn't zero, some tokens go to "
            "other experts than in transformers"
        ]
    if reader.name == "jamba" and (table.get("num_experts") or 0) > 1:
        return [
            "mlx-lm lets the weights of Jamba's chosen experts add up to 1, transformers takes "
            "them as they are: its expert layers count for more"
        ]
    sums = any(table.get(key, reader.defaults.get(key)) for key in SUMS)
    alone = any(table.get(key) == 1 for key in EXPERTS_CHOSEN)
    if reader.name in ONE_EXPERT_WEIGHS and sums and alone:
        return [
            "mlx-lm leaves the weight of the one expert that each token goes to as it is, "
            "transformers makes it 1: another model, unless it was trained as mlx-lm runs it"
        ]
    return []


def _logits(table: Table, reader: ModelClass) -> list[str]:
    """A factor of the logits that the class leaves out where the head is the embedding."""
    if reader.name not in ("minicpm", "minicpm3") or not table.get("tie_word_embeddings"):
        return []
    factor = table["hidden_size"] / table["dim_model_base"]
    if factor == 1:
        return []
    return [
        f"mlx-lm does not divide MiniCPM's logits by {factor:g} where its head is the embedding: "
        f"the best token is the same, but sampling is as at a temperature {factor:g} times lower, "
        "and a perplexity says nothing"
    ]


def _windows(table: Table, reader: ModelClass) -> list[str]:
    """Sliding windows that the class doesn't have."""
    window = table.get("sliding_window")
    if reader.name not in WITHOUT_WINDOWS or not isinstance(window, int) or window <= 0:
        return []
    if not _uses_windows(table, reader) or window >= table.get("max_position_embeddings", math.inf):
        return []
    return [
        f"mlx-lm's class {reader.name} runs no sliding windows: beyond {window:,} tokens it "
        "attends to more than transformers does"
    ]


def _uses_windows(table: Table, reader: ModelClass) -> bool:
    """Whether transformers' class goes by a `sliding_window` that is stated."""
    types = table.get("layer_types")
    if isinstance(types, list):
        return "sliding_attention" in types and "layer_types" not in reader.keys
    if reader.name.startswith("qwen"):
        return table.get("use_sliding_window") is True
    return reader.name != "llama" or table.get("model_type") == "mistral"
