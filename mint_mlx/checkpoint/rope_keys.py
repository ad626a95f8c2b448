"""Rotary positions as transformers 5 writes them, under the keys that mlx-lm's classes read.

transformers 5 keeps all of it in `rope_parameters`: flat, or one table for each type of layer.
"""

from __future__ import annotations

from typing import Any

from ..base.errors import MintError
from .model_classes import ModelClass

Table = dict[str, Any]
THETA = ("rope_theta", "rotary_emb_base")
FACTOR = ("partial_rotary_factor", "rotary_pct")
LOCAL_THETA = ("rope_local_base_freq", "swa_rope_theta", "rope_local_theta")
DEFAULT_THETA = 10000.0
# What transformers takes where none is stated, of families that have another one (without `_text`).
THETAS = {
    "apertus": 12e6,
    "bitnet": 500e3,
    "cohere": 500e3,
    "ernie4_5": 500e3,
    "ernie4_5_moe": 500e3,
    "exaone": 500e3,
    "gemma3": 1e6,
    "gemma3n": 1e6,
    "gpt_oss": 150e3,
    "helium": 100e3,
    "lfm2": 1e6,
    "lfm2_moe": 1e6,
    "llama4": 500e3,
    "longcat_flash": 10e6,
    "minimax": 1e6,
    "minimax_m2": 5e6,
    "minimax_m3_vl": 5e6,
    "mixtral": 1e6,
    "olmo3": 500e3,
    "phimoe": 1e6,
    "qwen2_5_vl": 1e6,
    "qwen2_vl": 1e6,
    "qwen3_vl": 500e3,
    "qwen3_vl_moe": 500e3,
    "smollm3": 2e6,
    "solar_open": 1e6,
}
FULL, SLIDING = "full_attention", "sliding_attention"
# The share of a head that transformers rotates where a config of the family says nothing.
DEFAULT_SHARE = {
    "glm": 0.5,
    "glm4": 0.5,
    "glm4_moe": 0.5,
    "mimo_v2_flash": 0.334,
    "nemotron": 0.5,
    "phi": 0.5,
    "qwen3_next": 0.25,
    "stablelm": 0.25,
}
# Classes that read `rope_parameters`, but no scaling from it.
SCALING_APART = {"exaone_moe"}


def rope_keys(table: Table, reader: ModelClass) -> Table:
    """What a table says in `rope_parameters`, by the keys that its class reads.

    Of a class that reads `rope_parameters` itself, only theta, where it reads another one as well.

    Raises:
        MintError: a `rope_scaling` stands beside them, for which transformers leaves theta out.
    """
    parameters = table.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return {}
    full, local = by_layer(parameters)
    _check_theta(table, full)
    if "rope_parameters" in reader.keys and reader.name not in SCALING_APART:
        inner = full.get("rope_theta")
        said = [name for name in THETA if name in reader.keys and name in table]
        return {name: inner for name in said if inner not in (None, table[name])}

    if local is None:
        full = full | _stated(table)
    added: Table = {}
    theta = full.get("rope_theta", table.get("rope_theta"))
    for name in THETA:
        if name in reader.keys and theta is not None:
            added[name] = theta
    for name in LOCAL_THETA:
        if name in reader.keys and local is not None and "rope_theta" in local:
            added[name] = local["rope_theta"]
    added |= _partial(table, full, reader)
    return added | _scaling(table, full, reader)


def _check_theta(table: Table, full: Table) -> None:
    """Refuse a `rope_scaling` that transformers would take without the theta that is stated.

    It takes such a table in place of `rope_parameters`, and theta from it, or from beside it, or
    else its default of the family.
    """
    scaling, theta = table.get("rope_scaling"), full.get("rope_theta")
    if not isinstance(scaling, dict) or not scaling or theta is None:
        return
    default = THETAS.get(str(table.get("model_type")).removesuffix("_text"), DEFAULT_THETA)
    taken = scaling.get("rope_theta", table.get("rope_theta", default))
    if taken != theta:
        raise MintError(
            f"config.json has rope_scaling beside rope_parameters; transformers takes rope_scaling "
            f"alone, and not the rope_theta of {theta} in rope_parameters: put the scaling into "
            "rope_parameters, and leave rope_scaling out"
        )


def by_layer(parameters: Table) -> tuple[Table, Table | None]:
    """The parameters of full attention, and those of sliding windows where they are apart."""
    tables = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if not tables:
        return parameters, None
    full = tables.get(FULL) or next(iter(tables.values()))
    return full, tables.get(SLIDING, full)


def is_scaled(parameters: Table) -> bool:
    """Whether positions are scaled in any way."""
    return rope_type(parameters) != "default"


def scaling_alone(parameters: Table) -> Table:
    """Positions without theta and the rotated share."""
    return {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}


def rope_type(parameters: Table) -> str:
    """The kind of scaling, `default` for none."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def _stated(table: Table) -> Table:
    """A `rope_scaling` beside `rope_parameters`, which transformers reads first."""
    scaling = table.get("rope_scaling")
    return dict(scaling) if isinstance(scaling, dict) else {}


def _partial(table: Table, full: Table, reader: ModelClass) -> Table:
    """The share of a head that is rotated."""
    factor = full.get("partial_rotary_factor", table.get("partial_rotary_factor"))
    if factor is None:
        factor = DEFAULT_SHARE.get(reader.name)
    for name in FACTOR:
        if name in reader.keys:
            # Where nothing is said, transformers rotates all of a head.
            said = factor is not None or reader.defaults[name] != 1.0
            return {name: 1.0 if factor is None else factor} if said else {}
    if "rotary_dim" in reader.required and "rotary_dim" not in table:
        size = table.get("head_dim") or table["hidden_size"] // table["num_attention_heads"]
        return {"rotary_dim": int(size * (1.0 if factor is None else factor))}
    return {}


def _scaling(table: Table, full: Table, reader: ModelClass) -> Table:
    """`rope_scaling`, of which transformers takes everything but theta and the rotated share."""
    if "rope_scaling" not in reader.keys:
        return {}
    if not is_scaled(full):
        return {"rope_scaling": None} if "rope_scaling" in reader.required else {}
    elsewhere = {"rope_theta"}
    if "partial_rotary_factor" in reader.keys:
        elsewhere.add("partial_rotary_factor")
    scaling = {k: v for k, v in full.items() if k not in elsewhere and v is not None}
    if reader.says("type"):
        scaling["type"] = rope_type(full)
    return {"rope_scaling": scaling}
