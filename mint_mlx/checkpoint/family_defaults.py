"""What transformers takes where a config leaves a key out, and mlx-lm's class takes something else.

A config needn't say everything: transformers fills in what its class of the family has, and writes
of a text model inside a larger one only what differs from that. mlx-lm's class fills in a default
of its own, often that of one release, and runs another model in silence.

Only keys that no tensor's shape tells. `tests/checkpoint/test_family_defaults.py` compares them
with the classes of transformers that are installed.
"""

from __future__ import annotations

from typing import Any

from ..base.errors import MintError
from .key_names import ALIASES
from .model_classes import REQUIRED, ModelClass
from .rope_keys import FULL, THETAS, by_layer

Table = dict[str, Any]

_DEEPSEEK: Table = {
    "n_group": 8,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}
_GEMMA4: Table = {"final_logit_softcapping": None, "num_kv_shared_layers": 0}
_QWEN3_5: Table = {
    "rope_parameters": {
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000.0,
        "rope_type": "default",
    }
}
# By the text model's `model_type`, as mlx-lm's class reads the key.
DEFAULTS: dict[str, Table] = {
    "afmoe": {
        "mup_enabled": False,
        "num_experts_per_tok": 6,
        "route_scale": 1.0,
        "sliding_window": 1024,
    },
    "apertus": {
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    },
    "bitnet": {"rope_theta": THETAS["bitnet"]},
    "cohere2": {"rope_theta": 10000.0},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "ernie4_5_moe": {"moe_k": 6},
    "exaone_moe": {"rope_theta": 10000.0},
    "falcon_h1": {
        "attention_out_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "key_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "mamba_norm_before_gate": True,
        "mlp_multipliers": [1.0, 1.0],
        "ssm_in_multiplier": 1.0,
        "ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 1.0],
        "ssm_out_multiplier": 1.0,
    },
    "gemma2": {"query_pre_attn_scalar": 256},
    "gemma3_text": {"sliding_window": 4096},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4 | {"sliding_window": 1024},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4_moe_lite": {"rope_theta": 10000.0},
    "gpt_oss": {
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        }
    },
    "granitemoehybrid": {
        "position_embedding_type": "nope",
        "time_step_limit": [0.0, float("inf")],
    },
    "kimi_linear": {
        "num_experts_per_token": 8,
        "routed_scaling_factor": 2.446,
    },
    "laguna": {
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.5,
                "rope_theta": 500000.0,
                "rope_type": "default",
            },
            "sliding_attention": {
                "partial_rotary_factor": 1.0,
                "rope_theta": 10000.0,
                "rope_type": "default",
            },
        }
    },
    "mimo_v2_flash": {"attention_value_scale": 0.707},
    "minicpm3": {"rope_theta": 10000.0},
    "muse_glimmer": {"rope_theta": 10000.0},
    "phi": {"partial_rotary_factor": 0.5},
    "phimoe": {"rms_norm_eps": 1e-5, "rope_theta": THETAS["phimoe"]},
    "qwen2": {"rope_theta": 10000.0},
    "qwen2_moe": {"rope_theta": 10000.0},
    "qwen3": {"rope_theta": 10000.0},
    "qwen3_5_moe_text": _QWEN3_5 | {"num_experts_per_tok": 8},
    "qwen3_5_text": _QWEN3_5,
    "qwen3_moe": {"norm_topk_prob": False},
    "qwen3_next": {"norm_topk_prob": True},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},  # its class has no such key
    "smollm3": {"rope_theta": THETAS["smollm3"]},
    "starcoder2": {"rope_theta": 10000.0},
}
# Sizes that mlx-lm's class requires, and that LLaVA and Pixtral leave out of the table inside.
_LLAMA: Table = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
}
SIZES_INSIDE: dict[str, Table] = {
    "llama": _LLAMA | {"intermediate_size": 11008},
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8},
}
# The same of families whose models need not have experts, where they have some.
WITH_EXPERTS: dict[str, Table] = {"nemotron_h": {"norm_topk_prob": True}}
# Families whose default theta versions 4 and 5 of transformers don't agree on.
UNSETTLED_THETA = {"cohere", "falcon_h1", "qwen3_vl_text"}


def family_defaults(table: Table, reader: ModelClass) -> Table:
    """What a table leaves out, as transformers' class of the family fills it in.

    Raises:
        MintError: what is left out means another model in each version of transformers.
    """
    family = str(table.get("model_type"))
    if family in UNSETTLED_THETA and not _says(table, "rope_theta"):
        raise MintError(
            f"config.json says no rope_theta, and versions of transformers take different ones for "
            f"{family}: add the one that the model was trained with"
        )
    defaults = DEFAULTS.get(family, {})
    if table.get("n_routed_experts"):
        defaults = defaults | WITH_EXPERTS.get(family, {})
    added = {
        key: value
        for key, value in defaults.items()
        if not _says(table, key) and value != reader.defaults.get(key, REQUIRED)
    }
    if "quantization" in table:  # told as a known difference: it is scored as everyone runs it
        added.pop("time_step_limit", None)
    if "rope_parameters" in defaults:
        added |= _positions(table, defaults["rope_parameters"])
    return added


def sizes_inside(table: Table) -> Table:
    """The sizes that the table of a text model inside a larger one leaves out."""
    sizes = SIZES_INSIDE.get(str(table.get("model_type")), {})
    return {key: size for key, size in sizes.items() if key not in table}


def _says(table: Table, key: str) -> bool:
    """Whether a table has a key, by any of its names, also among the parameters of positions."""
    if key == "rope_scaling":
        return "rope_scaling" in table or bool(table.get("rope_parameters"))
    names = next((names for names in ALIASES if key in names), (key,))
    parameters = table.get("rope_parameters")
    full = by_layer(parameters)[0] if isinstance(parameters, dict) else {}
    if key in ("position_embedding_type", "rope_theta"):  # null says none, as transformers takes it
        return any(values.get(key) is not None for values in (table, full))
    return key == "rope_parameters" or any(name in table or name in full for name in names)


def _positions(table: Table, default: Table) -> Table:
    """`rope_parameters` with what they leave out: as the table says it outside, else the default's.

    Parameters that are stated for each type of layer are taken as they are.
    """
    stated = table.get("rope_parameters") or table.get("rope_scaling") or {}
    if FULL in default or FULL in stated:
        return {} if stated else {"rope_parameters": default}
    outside = {key: table[key] for key in default if table.get(key) is not None}
    whole = default | outside | stated
    if "type" in stated:
        del whole["rope_type"]
    return {} if whole == stated else {"rope_parameters": whole}
