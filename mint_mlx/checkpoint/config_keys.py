"""Brings a config.json to the keys that mlx-lm's class of its family reads.

transformers 5 writes some keys under other names than the releases that mlx-lm's classes were
written for. A class drops a key that it doesn't know in silence, and runs with a default of its
own: another model. So each key is brought here to the name that the class reads. The result is
what the source is built from, and what stands in the result's config.json, since stock mlx-lm
reads that. transformers reads it as the same model: what it wrote itself stays beside.

All functions are pure. A config that the class reads as it stands comes back unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from ..base.hf_config import edit_text_config, text_config
from .bad_value import MALFORMED, bad_value
from .family_defaults import family_defaults, sizes_inside
from .family_keys import family_keys
from .key_names import ALIASES
from .layer_types import layer_type_keys
from .model_classes import REQUIRED, ModelClass, is_known, model_class, text_class
from .rope_keys import rope_keys
from .rope_length import LENGTH, added_length, rope_length

Table = dict[str, Any]
BAILING_DELTA = "BailingMoeV3ForCausalLM"
LISTS = ("mlp_only_layers",)
TAGGED = "__float__"  # how transformers writes numbers that JSON has no words for


def adapt(config: Table) -> Table:
    """A config with the keys that mlx-lm's class reads; itself where nothing is to be brought.

    A `model_type` that mlx-lm has no class for stays as it is.

    Raises:
        MintError: a value is of another type than any release has.
    """
    try:
        return _adapted(decoded(config))
    except MALFORMED as error:
        raise bad_value(config, lambda changed: _adapted(decoded(changed)), error) from error


@dataclass(frozen=True)
class Brought:
    """A key that mlx-lm's class would have read otherwise.

    Attributes:
        key: as the class reads it; `model_type` where the family's class is another one.
        value: that it has now.
        otherwise: what the class would have taken; REQUIRED where it couldn't have been made.
        reader: the class's name.
        left_out: whether config.json doesn't say it, and transformers fills it in.
    """

    key: str
    value: Any
    otherwise: Any
    reader: str
    left_out: bool = False

    def __str__(self) -> str:
        if self.key == "model_type":
            return f"says another model_type than {self.value}, which mlx-lm has a class for"
        if self.left_out:
            other = "none" if self.otherwise is REQUIRED else _short(self.otherwise)
            return (
                f"leaves out {self.key}, which is {_short(self.value)} in transformers and "
                f"{other} in mlx-lm's class {self.reader}"
            )
        stand_in = "can't do without"
        if self.otherwise is None:
            stand_in = "would take none"
        elif self.otherwise is not REQUIRED:
            stand_in = f"would take {_short(self.otherwise)}"
        return (
            f"says {self.key} {_short(self.value)} in a key or form that mlx-lm's class "
            f"{self.reader} does not read (it {stand_in})"
        )


def brought(config: Table) -> tuple[Brought, ...]:
    """What `adapt` changes in a config so that mlx-lm's class runs the same model."""
    config, adapted = decoded(config), adapt(config)
    reader = text_class(adapted)
    if reader is None or adapted == config:
        return ()
    if adapted.get("model_type") != config.get("model_type"):
        return (Brought("model_type", adapted["model_type"], REQUIRED, reader.name),)
    before, after = text_config(config), text_config(adapted)
    typed = {"model_type": _type_inside(config)} | before
    filled_in = family_defaults(typed, reader) | sizes_inside(typed)
    changes = [
        _change(key, before.get(key, reader.defaults.get(key)), value, reader, key in filled_in)
        for key, value in after.items()
        if value != before.get(key, reader.defaults.get(key))
    ]
    outer = model_class(adapted)
    if adapted.get("vocab_size") != config.get("vocab_size") and outer is not None:
        size = outer.defaults.get("vocab_size")
        changes.append(Brought("vocab_size", adapted["vocab_size"], size, outer.name))
    return tuple({change.key: change for change in changes}.values())


def _change(
    key: str, otherwise: Any, value: Any, reader: ModelClass, is_filled_in: bool
) -> Brought:
    """A key that has another value than before."""
    length = added_length(otherwise, value)
    if length is not None:
        return Brought(f"{key}.{LENGTH}", *length, reader.name, left_out=True)
    return Brought(key, value, otherwise, reader.name, is_filled_in)


def _short(value: Any) -> str:
    """A value as JSON, cut to one line."""
    text = json.dumps(encoded(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _adapted(config: Table) -> Table:
    """`adapt` without its checks of types; the config is the caller's copy."""
    config = _by_architecture(_flattened(_wrapped(config)))
    outer, text = model_class(config), text_class(config)
    if outer is None or text is None:
        return config
    nested = text_config(config)
    if not outer.nested or nested is config:
        return _brought(config, text)

    config = edit_text_config(config, lambda table: _brought_inside(table, config, text))
    # Where the outer class reads it too, the table that transformers goes by decides.
    outer_size = config.get("vocab_size", outer.defaults.get("vocab_size"))
    if "vocab_size" in outer.keys and nested.get("vocab_size", outer_size) != outer_size:
        config["vocab_size"] = nested["vocab_size"]
    return config


def _brought_inside(table: Table, config: Table, reader: ModelClass) -> Table:
    """The table of a text model inside a larger one, brought to what its class reads."""
    typed = {"model_type": _type_inside(config)} | table | _tied(config)
    brought_table = _brought(typed | sizes_inside(typed), reader)
    return {k: v for k, v in brought_table.items() if k != "model_type" or k in table}


def _type_inside(config: Table) -> str:
    """What transformers takes a text model for whose table has no `model_type`."""
    outer = str(config.get("model_type"))
    return INSIDE.get(outer, f"{outer}_text")


def _tied(config: Table) -> Table:
    """Whether the head is the embedding: since transformers 5 the outer table decides."""
    major = str(config.get("transformers_version")).partition(".")[0]
    tied = config.get("tie_word_embeddings")
    if not major.isdigit() or int(major) < 5 or not isinstance(tied, bool):
        return {}
    differs = text_config(config).get("tie_word_embeddings") == (not tied)
    return {"tie_word_embeddings": tied} if differs else {}


def _brought(table: Table, reader: ModelClass) -> Table:
    """A table with what its class reads under other names than it has."""
    for rule in RULES:
        table = table | rule(table, reader)
    return table


def _aliases(table: Table, reader: ModelClass) -> Table:
    """Keys that the class reads by another name than the table has."""
    added = {}
    for names in ALIASES:
        unread = [name for name in names if name in table and name not in reader.keys]
        wanted = [name for name in names if name in reader.keys]
        if len(unread) != 1 or len(wanted) != 1 or wanted[0] in table:
            continue
        if table[unread[0]] != reader.defaults[wanted[0]]:
            added[wanted[0]] = table[unread[0]]
    return added


def _head_dim(table: Table, reader: ModelClass) -> Table:
    """The size of a head, where the class can't derive it itself."""
    heads, hidden = table.get("num_attention_heads"), table.get("hidden_size")
    if "head_dim" not in reader.required or table.get("head_dim") is not None:
        return {}
    return {"head_dim": hidden // heads} if heads and hidden else {}


def _empty(table: Table, reader: ModelClass) -> Table:
    """Empty lists that are stated as null, which transformers takes for the same."""
    return {key: [] for key in LISTS if key in reader.keys and key in table and table[key] is None}


RULES: tuple[Callable[[Table, ModelClass], Table], ...] = (
    _empty,
    _aliases,
    _head_dim,
    rope_keys,
    layer_type_keys,
    family_keys,
    family_defaults,
    rope_length,
)


def _wrapped(config: Table) -> Table:
    """A text model's flat config in the table where its family's class looks for it.

    A larger model saved through its text class has the `model_type` X_text; where mlx-lm has a
    class only for X, that takes the text model's keys in a table `text_config`.
    """
    text_type = config.get("model_type")
    if not isinstance(text_type, str) or not text_type.endswith("_text"):
        return config
    if is_known(text_type) and not (text_type == "llama4_text" and _has_experts(config)):
        return config
    whole_type = text_type.removesuffix("_text")
    whole = model_class({"model_type": whole_type})
    if whole is None or not whole.nested or "text_config" in config:
        return config
    outside = {key: config[key] for key in OUTSIDE if key in config}
    text = {key: value for key, value in config.items() if key not in NOT_INSIDE}
    return outside | {"model_type": whole_type, "text_config": text}


def is_flattened(stated: Table) -> bool:
    """Whether `adapt` takes the text model out of the larger one that a config describes."""
    model_type = stated.get("model_type")
    if text_config(stated) is stated or model_type not in ALONE:
        return False
    return not is_known(model_type) or (model_type in UNSANITIZED and "quantization" not in stated)


def _flattened(config: Table) -> Table:
    """The config of the text model inside a larger one for which mlx-lm has no class itself."""
    if not is_flattened(config):
        return config
    outside = {key: config[key] for key in OUTSIDE if key in config}
    model_type, architecture = ALONE[config["model_type"]]
    named = {"model_type": model_type, "architectures": [architecture]}
    return outside | text_config(config) | _tied(config) | named


def _by_architecture(config: Table) -> Table:
    """Bailing's config with the architecture by which mlx-lm finds the class with delta attention.

    transformers calls all of its models alike; the class that mlx-lm has by that type has
    lightning attention.
    """
    names = config.get("architectures") or []
    delta = "kda_lower_bound" in config and "group_norm_size" not in config
    if config.get("model_type") != "bailing_hybrid" or not delta or BAILING_DELTA in names:
        return config
    return config | {"architectures": [*names, BAILING_DELTA]}


def _has_experts(config: Table) -> bool:
    """Whether a Llama 4 has experts: mlx-lm's class for its text model alone has none."""
    if isinstance(config.get("moe_layers"), list):
        return bool(config["moe_layers"])
    return bool(config.get("interleave_moe_layer_step"))


# Text models whose type isn't called after the larger model's.
INSIDE = {"kimi_k25": "deepseek_v3", "llava": "llama", "mistral3": "mistral"}
# Larger models of which mlx-lm has the text model alone: its type, and its class in transformers.
ALONE = {
    "lfm2-vl": ("lfm2", "Lfm2ForCausalLM"),
    "lfm2_vl": ("lfm2", "Lfm2ForCausalLM"),
    "step3p7": ("step3p5", "Step3p5ForCausalLM"),
}
# Of these mlx-lm has a class, which loads no tensors but those of an MLX checkpoint: convolutions
# are not transposed.
UNSANITIZED = {"lfm2-vl"}
# What a config says of the whole checkpoint, and not of its text model.
NOT_INSIDE = ("architectures", "quantization", "quantization_config", "transformers_version")
OUTSIDE = (
    *NOT_INSIDE,
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)


def decoded(value: Any) -> Any:
    """A copy of JSON data with transformers' tagged numbers as numbers."""
    if isinstance(value, dict):
        if value.keys() == {TAGGED} and isinstance(value[TAGGED], str):
            return float(value[TAGGED])
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else deepcopy(value)


def encoded(value: Any) -> Any:
    """A copy of data with infinite numbers tagged as transformers does: JSON has none."""
    if isinstance(value, float) and value - value != 0:
        name = "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
        return {TAGGED: name}
    if isinstance(value, dict):
        return {key: encoded(item) for key, item in value.items()}
    return [encoded(item) for item in value] if isinstance(value, (list, tuple)) else value
