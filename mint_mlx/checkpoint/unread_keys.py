"""The guard for the next rename: keys that make another model where mlx-lm's class drops them.

A class drops a key that it doesn't know in silence and runs with a default of its own. What is
known is brought to the right name (config_keys.py); what isn't is refused here, if it says
anything of positions, attention, experts, norms or scalings that the class doesn't do anyway.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ..base.errors import MintError
from ..base.hf_config import text_config
from .bad_value import MALFORMED, bad_value
from .family_keys import full_attention_heads, has_known_heads
from .key_names import ALIASES
from .layer_types import period
from .model_classes import ModelClass, text_class
from .read_in_part import read_in_part
from .rope_keys import FACTOR, LOCAL_THETA, THETA
from .router_keys import is_router_key, not_gone_by, says_what_is_done
from .unread_positions import SHARE, says_nothing_new, unread_positions

Table = dict[str, Any]

# Keys that count, by the words in them.
COUNTED = re.compile(
    # positions
    r"rope|rotary|theta|alibi|yarn|(^|_)ntk|^(?!.*(max|num|n)_position).*position|base_freq"
    # attention
    r"|window|softcap|query_pre_attn|qk_(layer_?)?norm|clip_qkv|attn_(scale|temperature)|^scale_attn_"
    r"|attention_(multiplier|bias|chunk|sink|scale)|qkv_bias|value_scale"
    # experts
    r"|expert|(^|_)moe(_|$)|routed|router|^route_|topk|top_k(_|$)|n_group$|scor(e_func|ing)"
    r"|sparse_step|indexer_types"
    # norms
    r"|norm_(type|eps|epsilon)$|norm.*_(eps|epsilon)$"
    # scalings
    r"|multiplier|logits?_scal|scale_(emb|depth)|(emb|embeddings?|residual)_scal|swiglu"
)
# Keys that have such words, and change nothing of what the model computes.
HARMLESS = frozenset(
    {
        "_sliding_window_pattern",
        "attention_dropout",
        "embeddings_scale_by_sqrt_dim",
        "experts_per_token",
        "first_k_dense_replace",
        "initial_context_length",
        "layer_rope_theta",
        "max_window_layers",
        "moe_apply_router_weight_on_input",
        "moe_aux_loss_coeff",
        "moe_capacity",
        "moe_dropout_prob",
        "moe_gate",
        "moe_intermediate_size",
        "moe_layers",
        "moe_layer_end_index",
        "moe_layer_interval",
        "moe_layer_start_index",
        "moe_norm_min",
        "moe_router_enable_expert_bias",  # the tensors tell
        "moe_shared_expert_overlap",
        "no_rope_layer_interval",
        "output_router_logits",
        "position_ids",
        "qk_head_dim",
        "qk_rope_head_dim",
        "rope_global_base_freq",  # vlm_keys.py
        "rope_parameters",  # unread_positions.py
        "rope_scaling",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "router_z_loss_coef",
        "scale_attention_softmax_in_fp32",
        "shared_expert_intermediate_size",  # the tensors tell
        "sliding_window",  # known_differences.py
        "sliding_window_pattern",
        "top_k",  # of sampling
        "use_grouped_topk",
        "use_routing_bias",
        "use_sliding_window",
    }
)
# What a class does that doesn't read the key, where that isn't what no, 0 or 1 says. `*`: all.
DOES: dict[str, dict[str, Any]] = {
    "attention_bias": {"gpt_neox": True, "gpt_oss": True, "phimoe": True},
    "decoder_sparse_step": {"*": 1},
    "final_logit_softcapping": {"nanochat": 15.0},
    "partial_rotary_factor": SHARE,
    "position_embedding_type": {"*": "rope"},
    "qk_norm_type": {"minimax": "per_layer"},
    "qkv_bias": {"qwen2_moe": True},
    "rope_interleave": {"*": True},
    "scale_attn_weights": {"*": True},
    "swiglu_alpha": {"gpt_oss": 1.702},
    "swiglu_limit": {"gpt_oss": 7.0},
}
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
# By the names of functions: words in the code of a class that computes them. (The exact GELU and
# its form by tanh aren't told apart: they differ by 2e-4, a tenth of a rounding to bfloat16.)
KINDS = {
    "silu": r"silu|swiglu|swish|switchglu",
    "swish": r"silu|swiglu|swish|switchglu",
    "gelu": r"gelu|geglu",
    "relu2": r"relu2|relu_squared",
    "relu": r"relu(?!2|_squared|\(x\)\.square)",
}
# What a class without such words computes, by code that it takes from another.
UNSAID = "silu"
# Functions of single kinds of layers, which no class reads.
IN_LAYERS = {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"}
# What an embedding model says.
BOTH_WAYS = {"use_bidirectional_attention": True, "is_causal": False}
# Classes without linear attention, of a type that models with it have too (MiniMax-Text-01).
FULL_ALONE = {"minimax"}
# Classes that look for a layer of full attention, and fail where there is none.
FULL_NEEDED = {"cohere2", "gemma3_text", "mellum", "qwen3_5", "qwen3_5_moe", "qwen3_next"}
# Classes that add 1 to norms only where they see the convolution of linear attention.
LINEAR_NEEDED = {"qwen3_5", "qwen3_5_moe"}
# Epsilons that differ by what no logit shows.
NEAR = {"nanochat": {"rms_norm_eps"}, "mamba": {"layer_norm_epsilon"}}


@dataclass(frozen=True)
class Unread:
    """A key of a config that mlx-lm's class doesn't read, with its value and the class's name.

    Attributes:
        verb: what the class doesn't do with the key.
    """

    key: str
    value: Any
    reader: str
    verb: str = "read"

    def __str__(self) -> str:
        value = json.dumps(self.value)
        short = value if len(value) <= 60 else f"{value[:57]}..."
        return f"{self.key} is {short}, which mlx-lm's class {self.reader} does not {self.verb}"


def check_keys(config: Table) -> None:
    """Refuse a config of which mlx-lm's class would make another model.

    Args:
        config: as `config_keys.adapt` brings it.

    Raises:
        MintError: naming key, value and class; or a value is of another type than any model's.
    """
    try:
        unread = unread_keys(config)
    except MALFORMED as error:
        raise bad_value(config, unread_keys, error) from error
    if not unread:
        return
    if unread[0].key in BOTH_WAYS:
        raise MintError(
            f"config.json says {unread[0]}: attention to later tokens is an embedding model's, and "
            "mlx-lm's classes have none; give a model that writes text"
        )
    if unread[0].verb != "read":
        raise MintError(
            f"config.json says {unread[0]}, so that mlx-lm would run another model: wait for a "
            "version of mlx-lm that runs it, and of mint-mlx that knows so"
        )
    raise MintError(
        f"config.json says {unread[0]}, so that mlx-lm would run another model: update mlx-lm "
        "and mint-mlx, or rename the key where the class reads it by another name"
    )


def unread_keys(config: Table) -> list[Unread]:
    """The keys that count, aren't read, and say another thing than the class does."""
    reader = text_class(config)
    if reader is None:
        return []
    table = text_config(config)
    unread = [
        Unread(key, value, reader.name)
        for key, value in table.items()
        if key not in reader.keys
        and COUNTED.search(key)
        and key not in HARMLESS
        and not _says_nothing(key, value, table, reader)
    ]
    unread += [Unread(key, value, reader.name) for key, value in unread_positions(table, reader)]
    unread += [Unread(key, value, reader.name) for key, value in not_gone_by(table, reader)]
    unread += [
        Unread(key, value, reader.name, "go by everywhere")
        for key, value in read_in_part(table, reader)
    ]
    if reader.name == "gemma2" and table.get("attn_logit_softcapping", 0) is None:
        unread.append(Unread("attn_logit_softcapping", None, reader.name, "run"))
    unread += _activations(table, reader) + _both_ways(table, reader)
    return unread + _layer_types(table, reader) + _layers_apart(table, reader)


def _says_nothing(key: str, value: Any, table: Table, reader: ModelClass) -> bool:
    """Whether a value is what the class does, or said by a key that it reads."""
    same = {name for names in ALIASES if key in names for name in names if name in reader.keys}
    if any(name in table or reader.defaults[name] == value for name in same):
        return True
    if is_router_key(key):
        return says_what_is_done(key, value, reader)
    does = DOES.get(key, {})
    if reader.name in does or "*" in does:
        return bool(value is None or value == does.get(reader.name, does.get("*")))
    if key in NEAR.get(reader.name, ()):
        return True
    if value in (None, False, "", [], {}, 0):
        return True
    if value == 1 and not isinstance(value, bool):
        return True  # one group, a factor of one
    if key == "no_rope_layers":
        return bool(value == [int((i + 1) % 4 != 0) for i in range(len(value))])
    if key == "indexer_types":
        return set(value) == {"full"}  # none shares what an earlier one chose
    if key == "query_pre_attn_scalar":
        return bool(value == table.get("head_dim"))
    in_positions = key in (*THETA, *FACTOR, *LOCAL_THETA)
    return in_positions and says_nothing_new(key, value, table, reader)


def _activations(table: Table, reader: ModelClass) -> list[Unread]:
    """A function between two products of another kind than any in the class's code."""
    code = re.sub(r"#.*", "", reader.code).lower()
    computed = {kind for kind, words in KINDS.items() if re.search(words, code)} or {UNSAID}
    unread = [
        Unread(key, table[key], reader.name)
        for key, function in IN_LAYERS.items()
        if key in table and key not in reader.keys and table[key] != function
    ]
    for key in ACTIVATIONS:
        name = table.get(key)
        if not isinstance(name, str) or f".{key}" in code:
            continue
        kind = next((kind for kind in KINDS if name.startswith(kind)), None)
        if kind not in computed and (kind is not None or name.lower() not in code):
            unread.append(Unread(key, name, reader.name))
    return unread


def _both_ways(table: Table, reader: ModelClass) -> list[Unread]:
    """Attention to later tokens, as embedding models have it: mlx-lm's classes write text."""
    return [
        Unread(key, value, reader.name)
        for key, value in BOTH_WAYS.items()
        if table.get(key) is value
    ]


def _layer_types(table: Table, reader: ModelClass) -> list[Unread]:
    """Types of layers that no period expresses, for a class that reads only a period."""
    types = table.get("layer_types")
    if not isinstance(types, list):
        return []
    alone = "linear_attention" in types and reader.name in FULL_ALONE
    needed = {"full_attention": FULL_NEEDED, "linear_attention": LINEAR_NEEDED}
    lacks = any(kind not in types and reader.name in names for kind, names in needed.items())
    apart = reader.name == "llama4" and types != [
        "full_attention" if (i + 1) % 4 == 0 else "chunked_attention" for i in range(len(types))
    ]
    # A model with windows has no positions in full attention; this class goes by the types alone.
    unseen = reader.name == "exaone_moe" and bool(table.get("sliding_window"))
    if alone or lacks or apart or (unseen and "sliding_attention" not in types):
        return [Unread("layer_types", types, reader.name)]
    periods = {"sliding_window_pattern", "full_attention_interval"} & reader.keys
    if "layer_types" in reader.keys or not periods:
        return []
    fits = period(types) is not None or isinstance(table.get("sliding_window_pattern"), str)
    return [] if fits else [Unread("layer_types", types, reader.name)]


def _layers_apart(table: Table, reader: ModelClass) -> list[Unread]:
    """Sizes of single layers, where the class knows none."""
    key = "per_layer_config"
    if not table.get(key) or key in reader.keys:
        return []
    fits = reader.name == "gemma4_text" and full_attention_heads(table) is not None
    fits |= reader.name == "step3p5" and has_known_heads(table)
    return [] if fits else [Unread(key, table[key], reader.name)]
