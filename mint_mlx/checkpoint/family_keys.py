"""Keys of single families that transformers 5 writes in another form, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .model_classes import ModelClass
from .rope_keys import is_scaled, scaling_alone

Table = dict[str, Any]

# Keys that no released model of the family differs in; transformers doesn't write them.
CONSTANTS: dict[str, Table] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "kimi_linear": {"rope_theta": 10000.0, "mla_use_nope": True},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mimo_v2_flash": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_shared_experts": None,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minimax": {"shared_intermediate_size": 0},
    "solar_open": {"first_k_dense_replace": 0},
}
# Keys that a class requires, and the key that holds the same number.
EQUAL: dict[str, dict[str, str]] = {
    "gpt2": {"n_ctx": "n_positions"},
    "lfm2": {"block_dim": "hidden_size"},
    "mimo_v2_flash": {
        "swa_num_attention_heads": "num_attention_heads",
        "swa_head_dim": "head_dim",
        "swa_v_head_dim": "v_head_dim",
    },
    "solar_open": {"intermediate_size": "moe_intermediate_size"},
    "step3p5": {"num_attention_groups": "num_key_value_heads"},
}


def family_keys(table: Table, reader: ModelClass) -> Table:
    """What a class requires and its family's config of transformers 5 says otherwise or not.

    Nothing where no required key is missing, but for the families that have a rule of their own.
    """
    added: Table = {}
    missing = [key for key in reader.required if key not in table]
    if missing:
        equal = EQUAL.get(reader.name, {})
        added = {key: table[old] for key, old in equal.items() if key in missing and old in table}
        constants = CONSTANTS.get(reader.name, {})
        added |= {key: value for key, value in constants.items() if key not in table}
    rule = FAMILY_RULES.get(reader.name)
    return added | rule(table) if rule else added


def _gemma4(table: Table) -> Table:
    """Heads of layers with full attention; the unified model has no inputs of layers."""
    heads = full_attention_heads(table) or {}
    if "per_layer_config" in table and "head_dim" in table:
        heads = {"head_dim": table["head_dim"]} | heads  # what it doesn't say is as elsewhere
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    added = {names[key]: size for key, size in heads.items() if names[key] not in table}
    if table.get("model_type") == "gemma4_unified_text":
        added["hidden_size_per_layer_input"] = table.get("hidden_size_per_layer_input", 0)
    return added


def full_attention_heads(table: Table) -> Table | None:
    """What `per_layer_config` says alike of all layers with full attention, and of no others.

    None where it says anything else than the number and size of their heads.
    """
    layers = {int(number): heads for number, heads in (table.get("per_layer_config") or {}).items()}
    types = table.get("layer_types") or []
    full = [number for number, name in enumerate(types) if name == "full_attention"]
    if not layers:
        return {}
    first: Table = next(iter(layers.values()))
    alike = sorted(layers) == full and all(heads == first for heads in layers.values())
    return first if alike and first.keys() <= {"head_dim", "num_key_value_heads"} else None


def has_known_heads(table: Table) -> bool:
    """Whether `per_layer_config` only repeats how many heads Step 3.5's sliding windows have."""
    types = table.get("layer_types") or []
    heads = {"num_attention_heads": table.get("num_sliding_attention_heads")}
    return all(
        types[int(number)] == "sliding_attention" and config == heads
        for number, config in table["per_layer_config"].items()
    )


def _exaone4(table: Table) -> Table:
    """The pattern of windows, which mlx-lm's class takes as letters only."""
    types, pattern = table.get("layer_types"), table.get("sliding_window_pattern")
    if not types or not pattern or isinstance(pattern, str):
        return {}
    letters = "".join("L" if name == "sliding_attention" else "G" for name in types)
    # Layers of full attention have no positions, in a model that has windows.
    windows = "L" in letters or table.get("sliding_window")
    return {"sliding_window_pattern": letters if windows else None}


def _exaone_moe(table: Table) -> Table:
    """Which layers have experts."""
    types = table.get("mlp_layer_types")
    if not types or "is_moe_layer" in table:
        return {}
    return {"is_moe_layer": [name == "sparse" for name in types]}


def _kimi_linear(table: Table) -> Table:
    """The layers with linear attention and their sizes, counted from one."""
    types = table.get("layer_types")
    if not types or "linear_attn_config" in table:
        return {}
    numbers: dict[str, list[int]] = {"linear_attention": [], "full_attention": []}
    for number, name in enumerate(types, 1):
        numbers.setdefault(name, []).append(number)
    return {
        "linear_attn_config": {
            "kda_layers": numbers["linear_attention"],
            "full_attn_layers": numbers["full_attention"],
            "num_heads": table.get("linear_num_heads"),
            "head_dim": table.get("linear_head_dim"),
            "short_conv_kernel_size": table.get("linear_conv_kernel_dim"),
        }
    }


def _bailing_delta(table: Table) -> Table:
    """The width of shared experts, where transformers wrote the config (by a key of its own)."""
    key = "moe_shared_expert_intermediate_size"
    if "linear_num_heads" not in table or key in table:
        return {}
    return {key: table["moe_intermediate_size"]}


def _mamba2(table: Table) -> Table:
    """The width inside a block."""
    if "intermediate_size" in table or not {"expand", "hidden_size"} <= table.keys():
        return {}
    return {"intermediate_size": int(table["expand"] * table["hidden_size"])}


def _mimo(table: Table) -> Table:
    """Which layers have windows and which have experts, and the windows' width and heads."""
    added: Table = {}
    if "swa_num_key_value_heads" not in table and "num_key_value_heads" in table:
        added["swa_num_key_value_heads"] = 2 * table["num_key_value_heads"]
    if "hybrid_layer_pattern" not in table and table.get("layer_types"):
        sliding = [name == "sliding_attention" for name in table["layer_types"]]
        added["hybrid_layer_pattern"] = [int(one) for one in sliding]
    if "moe_layer_freq" not in table and table.get("mlp_layer_types"):
        added["moe_layer_freq"] = [int(name == "sparse") for name in table["mlp_layer_types"]]
    if "sliding_window_size" not in table and table.get("sliding_window"):
        added["sliding_window_size"] = table["sliding_window"] - 1  # transformers counts the query
    return added


def _step3p5(table: Table) -> Table:
    """Positions layer by layer, the heads of windows, and which layers have experts."""
    types, positions = table.get("layer_types"), table.get("rope_parameters")
    if not types or not isinstance(positions, dict):
        return {}
    layers = [positions.get(name) or {} for name in types]
    added: Table = {"rope_theta": [layer.get("rope_theta", 10000.0) for layer in layers]}
    shares = [layer.get("partial_rotary_factor", 1.0) for layer in layers]
    added["partial_rotary_factors"] = shares

    # One scaling serves the types of layers that have any.
    scaled = sorted(name for name, layer in positions.items() if is_scaled(layer))
    if scaled:
        scaling = scaling_alone(positions[scaled[0]])
        added |= {"rope_scaling": scaling, "yarn_only_types": scaled}
    heads, groups = table.get("num_sliding_attention_heads"), table.get("num_key_value_heads")
    if heads and "attention_other_setting" not in table:
        other = {"num_attention_heads": heads, "num_attention_groups": groups}
        added["attention_other_setting"] = other
    kinds = table.get("mlp_layer_types") or []
    if "moe_layers_enum" not in table and "sparse" in kinds:
        sparse = [str(layer) for layer, kind in enumerate(kinds) if kind == "sparse"]
        added["moe_layers_enum"] = ",".join(sparse)
    return added


def _scaling_by_one(table: Table) -> Table:
    """A scaling by 1, for classes that can't do without one. (transformers goes by its type.)"""
    if table.get("rope_scaling") is not None:
        return {}
    length = table.get("max_position_embeddings", 4096)
    scaling = {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": length}
    return {"rope_scaling": scaling}


def _gpt_bigcode(table: Table) -> Table:
    """The width of the MLP, four times the model's where the config says none."""
    width = table.get("n_embd")
    if table.get("n_inner") is not None or not isinstance(width, int):
        return {}
    return {"n_inner": 4 * width}


def _dbrx(table: Table) -> Table:
    """Theta, which mlx-lm's class looks for in the table of attention."""
    parameters, attention = table.get("rope_parameters") or {}, table.get("attn_config")
    if "rope_theta" not in parameters or not isinstance(attention, dict):
        return {}
    return {"attn_config": attention | {"rope_theta": parameters["rope_theta"]}}


def _normalized(table: Table) -> Table:
    """Routers' choices add up to 1, where transformers' class has no key that says otherwise."""
    always = table.get("model_type") in ("qwen3_5_moe_text", "qwen3_vl_moe_text")
    return {"norm_topk_prob": True} if always and table.get("norm_topk_prob") is False else {}


FAMILY_RULES: dict[str, Callable[[Table], Table]] = {
    "bailing_moe_v3": _bailing_delta,
    "dbrx": _dbrx,
    "deepseek_v2": _scaling_by_one,
    "exaone4": _exaone4,
    "exaone_moe": _exaone_moe,
    "gemma4_text": _gemma4,
    "gpt_bigcode": _gpt_bigcode,
    "kimi_linear": _kimi_linear,
    "mamba2": _mamba2,
    "minicpm3": _scaling_by_one,
    "mimo_v2_flash": _mimo,
    "qwen3_5": _normalized,
    "qwen3_moe": _normalized,
    "step3p5": _step3p5,
}
