"""What mlx-lm's routers of experts do where their class doesn't read the key that says it.

A router scores the experts, chooses some of them, and may divide their weights by the sum. A class
that drops one of these keys in silence does what it always does: each key must say just that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .model_classes import ModelClass

Table = dict[str, Any]

# Names of one and the same thing in the configs of different families.
SCORES = (
    "scoring_func",
    "score_function",
    "score_func",
    "moe_router_activation_func",
    "moe_router_score_func",
)
SUMS = ("norm_topk_prob", "moe_renormalize", "norm_expert_weight", "route_norm")
CHOICES = ("topk_method",)
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")


@dataclass(frozen=True)
class _Router:
    """What a class does; None where it reads a key that says it.

    Attributes:
        score: how an expert's logit becomes its weight.
        sums: whether the weights of the chosen experts add up to 1.
        choice: `noaux_tc` where a bias is added to the scores before the best are chosen.
    """

    score: str | None
    sums: bool | None
    choice: str | None


_SOFTMAX = _Router("softmax", None, "greedy")
_SOFTMAX_OF_CHOSEN = _Router("softmax", True, "greedy")
_SOFTMAX_OF_ALL = _Router("softmax", False, "greedy")
_SIGMOID = _Router("sigmoid", None, "noaux_tc")
_SIGMOID_OF_CHOSEN = _Router("sigmoid", True, "noaux_tc")
_STATED = _Router(None, None, "noaux_tc")

_ROUTERS: dict[str, _Router] = {
    "Klear": _SIGMOID,
    "afmoe": _STATED,
    "bailing_hybrid": _STATED,
    "bailing_moe": _STATED,
    "bailing_moe_linear": _STATED,
    "bailing_moe_v3": _SIGMOID_OF_CHOSEN,
    "dbrx": _SOFTMAX_OF_CHOSEN,
    "deepseek": _SOFTMAX_OF_ALL,
    "deepseek_v2": _Router("softmax", False, None),
    "deepseek_v41": _STATED,
    "dots1": _STATED,
    "ernie4_5_moe": _SOFTMAX_OF_CHOSEN,
    "gemma4_text": _SOFTMAX_OF_CHOSEN,
    "gpt_oss": _SOFTMAX_OF_CHOSEN,
    "granitemoe": _SOFTMAX_OF_CHOSEN,
    "granitemoehybrid": _SOFTMAX_OF_CHOSEN,
    "hunyuan": _SOFTMAX_OF_ALL,
    "jamba": _SOFTMAX_OF_CHOSEN,
    "kimi_k3": _STATED,
    "kimi_linear": _STATED,
    "laguna": _Router(None, True, "noaux_tc"),
    "lfm2_moe": _SIGMOID,
    "llama4": _Router("sigmoid", False, "greedy"),
    "longcat_flash": _Router("softmax", None, "noaux_tc"),
    "longcat_flash_ngram": _Router("softmax", None, "noaux_tc"),
    "mellum": _SOFTMAX,
    "minimax": _Router(None, True, "noaux_tc"),
    "minimax_m3_vl": _SIGMOID_OF_CHOSEN,
    "mistral4": _SOFTMAX,
    "mixtral": _SOFTMAX_OF_CHOSEN,
    "muse_spark": _SIGMOID_OF_CHOSEN,
    "nemotron_h": _SIGMOID,
    "olmoe": _SOFTMAX,
    "phixtral": _SOFTMAX_OF_CHOSEN,
    "qwen2_moe": _SOFTMAX_OF_ALL,
    "qwen3_5": _SOFTMAX,
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "step3p5": _SIGMOID,
}
# Classes that read such a key without going by it, and the values for which that is right.
_SIGMOID_ALONE = {"sigmoid"}
_FIXED: dict[str, dict[str, set[str]]] = {
    "scoring_func": {
        "deepseek_v3": _SIGMOID_ALONE,
        "deepseek_v32": _SIGMOID_ALONE,
        "dots1": {"sigmoid", "noaux_tc"},  # its release calls a choice a score
        "exaone_moe": _SIGMOID_ALONE,
        "glm4_moe": _SIGMOID_ALONE,
        "glm4_moe_lite": _SIGMOID_ALONE,
        "glm_moe_dsa": _SIGMOID_ALONE,
        "mimo_v2_flash": _SIGMOID_ALONE,
        "minimax": _SIGMOID_ALONE,
    },
    "topk_method": {"deepseek_v2": {"gready", "greedy", "group_limited_greedy"}},
}


def is_router_key(key: str) -> bool:
    """Whether a key says what a router does."""
    return key in (*SCORES, *SUMS, *CHOICES)


def says_what_is_done(key: str, value: Any, reader: ModelClass) -> bool:
    """Whether a router's key that the class doesn't read says what the class does.

    True also of classes without experts.
    """
    if value is None or not reader.keys & {*COUNTS}:
        return True
    router = _ROUTERS.get(reader.name)
    if router is None:
        return False
    if key in SUMS:
        return bool(value) == router.sums
    return bool(value == (router.score if key in SCORES else router.choice))


def not_gone_by(table: Table, reader: ModelClass) -> list[tuple[str, Any]]:
    """Keys with values that the class reads, but doesn't go by."""
    unread = [
        (key, table[key])
        for key, classes in _FIXED.items()
        if table.get(key) is not None and table[key] not in classes.get(reader.name, {table[key]})
    ]
    experts = table.get("ffn_config")
    if reader.name == "dbrx" and isinstance(experts, dict):
        power = experts.get("moe_normalize_expert_weights", 1)
        unread += [] if power == 1 else [("ffn_config.moe_normalize_expert_weights", power)]
    return unread
