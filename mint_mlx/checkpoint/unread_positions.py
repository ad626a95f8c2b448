"""What a config says of rotary positions that mlx-lm's class does not do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .model_classes import ModelClass
from .rope_keys import (
    DEFAULT_SHARE,
    DEFAULT_THETA,
    FACTOR,
    LOCAL_THETA,
    THETA,
    by_layer,
    is_scaled,
    rope_type,
    scaling_alone,
)

Table = dict[str, Any]
# Classes (of mlx-lm 0.32) that read `rope_scaling` and do nothing with it.
UNSCALED = {"gemma3n", "glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe", "solar_open"}
# Classes that read `rope_parameters` and take theta from it, nothing else.
THETA_ALONE = {"granitemoehybrid", "lfm2", "lfm2_moe", "muse_glimmer", "muse_spark"}
# Classes that know these kinds of scaling only, and treat any other as none.
KINDS = {
    "deepseek": {"linear"},
    "deepseek_v2": {"yarn"},
    "glm_moe_dsa": {"linear", "yarn"},
    "gpt_oss": {"linear", "llama3", "yarn"},
    "mellum": {"llama3", "longrope", "yarn"},
    "olmo_hybrid": set(),
    "hunyuan": {"dynamic"},
    "hunyuan_v1_dense": {"dynamic"},
    "minicpm3": {"longrope", "su"},
    "nemotron": {"linear"},
    "phi3": {"longrope", "su", "linear"},
    "phimoe": {"longrope", "su"},
}
# Classes that rotate neighbouring channels, which mlx-lm's longrope does not.
INTERLEAVED = {
    "bailing_hybrid",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "llama4",
    "longcat_flash",
    "longcat_flash_ngram",
    "mistral4",
}
# Kinds of scaling that only these classes do.
ALONE = {"proportional": ("gemma4",)}
# Classes without rotary positions, and ones that rotate another share of a head than all of it.
NO_ROPE = {
    "gpt2",
    "gpt_bigcode",
    "jamba",
    "kimi_k3",
    "kimi_linear",
    "mamba",
    "mamba2",
    "nemotron_h",
    "rwkv7",
}
SHARE = {"recurrent_gemma": 0.5}
# Families in which a share outside of `rope_parameters` never had a meaning.
WHOLE = {"llama4", "muse_spark", "qwen3_moe"}
# Classes that take theta and the share of each layer from lists (family_keys.py).
BY_LAYER = {"step3p5"}
# A class that reads theta and takes 10000.
FIXED_THETA = {"recurrent_gemma"}
TOLERANCE = 1e-3  # of an attention factor that is written out with few digits


def unread_positions(table: Table, reader: ModelClass) -> Iterator[tuple[str, Any]]:
    """Keys inside `rope_parameters` and `rope_scaling` that the class drops, with their values."""
    parameters = table.get("rope_parameters")
    scaling = table.get("rope_scaling")
    if reader.name in NO_ROPE:
        return
    if isinstance(parameters, dict) and parameters:
        # transformers takes a scaling beside them in their place.
        beside = scaling if isinstance(scaling, dict) and is_scaled(scaling) else {}
        if beside and scaling_alone(beside) != scaling_alone(by_layer(parameters)[0]):
            yield from _scaling("rope_scaling", beside, reader)
        if "rope_parameters" in reader.keys:
            yield from _half_read(table, parameters, reader)
        else:
            yield from _brought(table, parameters, reader)
        for each in {id(each): each for each in by_layer(parameters) if each}.values():
            yield from _attention_factor(table, each)
    elif isinstance(scaling, dict) and scaling:
        if is_scaled(scaling):
            yield from _scaling("rope_scaling", scaling, reader)
        yield from _attention_factor(table, scaling)

        # transformers takes a theta in there before all others.
        theta = scaling.get("rope_theta")
        if theta is not None and theta != table.get("rope_theta"):
            yield "rope_scaling.rope_theta", theta


def says_nothing_new(key: str, value: Any, table: Table, reader: ModelClass) -> bool:
    """Whether a theta or a share that the class doesn't read is what it does all the same."""
    if reader.name in NO_ROPE or ("rope_parameters" in reader.keys and "rope_parameters" in table):
        return True
    if key in FACTOR and reader.name in WHOLE:
        return True
    # Windows may have the theta of all other layers.
    alike: tuple[tuple[str, ...], ...] = (THETA, FACTOR, (*LOCAL_THETA, *THETA))
    names = next(names for names in alike if key in names)
    read = [table[name] for name in names if name in reader.keys and name in table]
    return value in read or (key in THETA and value == DEFAULT_THETA)


def _half_read(table: Table, parameters: Table, reader: ModelClass) -> Iterator[tuple[str, Any]]:
    """Of `rope_parameters` that the class reads, what it doesn't use."""
    full, local = by_layer(parameters)
    done = reader.name not in THETA_ALONE and _is_done(rope_type(full), reader)
    if is_scaled(full) and not done:
        yield "rope_parameters.rope_type", rope_type(full)
    if local is not None and is_scaled(local) and not _is_done(rope_type(local), reader):
        yield "rope_parameters.sliding_attention.rope_type", rope_type(local)
    share = full.get("partial_rotary_factor")
    if reader.name in THETA_ALONE | {"qwen3", "exaone_moe"} and share not in (None, 1.0):
        yield "rope_parameters.partial_rotary_factor", share

    # A class that reads the number of rotated channels takes it before the share.
    rotated = table.get("rotary_dim") if "rotary_dim" in reader.keys else None
    if rotated and share is not None and rotated != int(table["head_dim"] * share):
        yield "rope_parameters.partial_rotary_factor", share


def _brought(table: Table, parameters: Table, reader: ModelClass) -> Iterator[tuple[str, Any]]:
    """Of `rope_parameters` that the class doesn't read, what has no place elsewhere."""
    full, local = by_layer(parameters)
    if reader.name in BY_LAYER:
        tables = [value for value in parameters.values() if isinstance(value, dict)]
        scalings = [scaling_alone(table) for table in tables if is_scaled(table)]
        if any(scaling != scalings[0] for scaling in scalings):
            yield "rope_parameters.sliding_attention.rope_type", rope_type(local or full)
        return
    theta = full.get("rope_theta")
    fixed = reader.name in FIXED_THETA
    if (fixed or not reader.keys & {*THETA, "attn_config"}) and theta not in (None, DEFAULT_THETA):
        yield "rope_parameters.rope_theta", theta

    # Sliding windows have a theta of their own in some classes, and a scaling in none.
    local_theta = (local or full).get("rope_theta", theta)
    if local_theta != theta and not reader.keys & set(LOCAL_THETA):
        yield "rope_parameters.sliding_attention.rope_theta", local_theta
    if local is not None and local is not full and is_scaled(local):
        yield "rope_parameters.sliding_attention.rope_type", rope_type(local)

    share = full.get("partial_rotary_factor", DEFAULT_SHARE.get(reader.name))
    if not reader.keys & {*FACTOR, "rotary_dim"} and share not in (None, SHARE.get(reader.name, 1)):
        yield "rope_parameters.partial_rotary_factor", share
    local_share = (local or full).get("partial_rotary_factor", share)
    if local_share != share:
        yield "rope_parameters.sliding_attention.partial_rotary_factor", local_share
    if is_scaled(full):
        yield from _scaling("rope_parameters", full, reader)


def _scaling(key: str, scaling: Table, reader: ModelClass) -> Iterator[tuple[str, Any]]:
    """A kind of scaling that the class doesn't do."""
    kind = rope_type(scaling)
    known = "rope_scaling" in reader.keys and reader.name not in UNSCALED
    if not known or not _is_done(kind, reader):
        yield f"{key}.rope_type", kind


def _is_done(kind: str, reader: ModelClass) -> bool:
    """Whether a class that scales positions does this kind of it."""
    if kind in ("longrope", "su") and reader.name in INTERLEAVED:
        return False
    if not reader.name.startswith(ALONE.get(kind, "")):
        return False
    return kind in KINDS.get(reader.name, {kind})


def _attention_factor(table: Table, scaling: Table) -> Iterator[tuple[str, Any]]:
    """A factor on queries and keys other than the one that follows from the scaling."""
    if rope_type(scaling) in ("longrope", "su"):
        yield from _longrope_factor(table, scaling)
        return
    factor = scaling.get("factor")
    if rope_type(scaling) != "yarn" or not isinstance(factor, (int, float)) or factor <= 1:
        return

    # transformers goes by both of these, or by neither; mlx-lm by each that is there.
    grown, kept_in_scale = scaling.get("mscale"), scaling.get("mscale_all_dim")
    done = _yarn_factor(factor, 1 if grown is None else grown, kept_in_scale or 0)
    meant = scaling.get("attention_factor")
    if not isinstance(meant, (int, float)):
        both = (grown, kept_in_scale) if grown and kept_in_scale else (1, 0)
        meant = _yarn_factor(factor, *both)
    if abs(meant - done) > TOLERANCE:
        yield "attention_factor of the positions", meant


def _yarn_factor(factor: float, grown: float, kept_in_scale: float) -> float:
    """YaRN's factor on queries and keys, without what a class puts into the attention's scale."""
    log = 0.1 * math.log(factor)
    return (grown * log + 1) / (kept_in_scale * log + 1)


def _longrope_factor(table: Table, scaling: Table) -> Iterator[tuple[str, Any]]:
    """The factor of longrope, unless it is what mlx-lm computes from the two lengths."""
    longest = table.get("max_position_embeddings")
    original = scaling.get("original_max_position_embeddings") or table.get(
        "original_max_position_embeddings"
    )
    if not isinstance(longest, int) or not isinstance(original, int) or original <= 1:
        return
    factor = scaling.get("factor") or longest / original
    follows, computed = (
        math.sqrt(1 + math.log(max(grown, 1)) / math.log(original))
        for grown in (factor, longest / original)
    )
    stated = scaling.get("attention_factor")
    stated = follows if stated is None else stated
    if abs(stated - computed) > TOLERANCE:
        yield "attention_factor of the positions", stated
