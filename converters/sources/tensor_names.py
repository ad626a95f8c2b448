"""Tensors under other names than mlx-lm's `sanitize` knows: renamed, split and stacked before it.

transformers 5 holds all experts of a block in two tensors, `experts.gate_up_proj` of shape
(experts, 2 x outputs, inputs) and `experts.down_proj`, and writes the released names only where
its own `save_pretrained` writes. Other ways to save (Accelerate's `save_model`, DeepSpeed's
consolidation, `save_original_format=False`) leave the names that the tensors have in memory.

Each step is decided by names and shapes: what would not become a parameter of the model, of just
that shape, stays as it is, and mlx-lm refuses it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ...base.hf_config import text_config
from .family_names import family_name

Weights = dict[str, mx.array]
Shape = tuple[int, ...]

# The type of a class that reads fused experts itself, and whether it takes (experts, inputs,
# outputs), None where only under another name; of gpt-oss and Muse, which have layouts of their
# own, nothing is renamed.
FUSED_ITSELF = {
    "gemma4": False,
    "gemma4_text": False,
    "llama4": True,
    "minimax_m3_vl": None,
    "mistral4": False,
    "qwen3_5_moe": False,
    "qwen3_vl_moe": True,
}
NOT_RENAMED = ("gpt_oss", "muse_spark")
# The types of whole models beside Llama-4 whose `sanitize` expects a prefix on text models too.
SAVED_ALONE = ("gemma4_unified",)
# What a model with a head puts before the names of all but the head.
BASE, EMBEDDING = "model.", "embed_tokens.weight"
# What distributed training, torch.compile and adapters put before every name.
WRAPPERS = ("module.", "base_model.model.")
# The same, of which every module may have one.
INNER_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Classes whose `sanitize` does the rest of its work only where it finds single experts.
SINGLE_EXPERTS = ("qwen3_next",)

_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
_FUSED = {f"{block}.experts.gate_up_proj{end}" for block in _BLOCKS for end in ("", ".weight")}
_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_SHARED = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")
# What a router is called in memory, and in releases.
_ROUTERS = (
    ("router.", "gate."),
    ("gate.", "router."),
    ("router.", "router.layer."),
    ("gate.e_score_correction_bias", "e_score_correction_bias"),
    ("router.e_score_correction_bias", "e_score_correction_bias"),
    ("e_score_correction_bias", "gate.e_score_correction_bias"),
)


@dataclass(frozen=True)
class _Model:
    """What the model has that the tensors are loaded into.

    Attributes:
        model_type: of its config.
        zero_experts: how many experts without weights follow after the others.
        first_shared: the number of the first layer that takes its keys and values from another.
        names: of all parameters.
        blocks: by block number the shapes of its parameters, by what follows the number in a name.
    """

    model_type: str
    zero_experts: int
    first_shared: int
    names: frozenset[str]
    blocks: Mapping[int, Mapping[str, Shape]]


@dataclass(frozen=True)
class _Place:
    """A tensor's name in parts: up to the number of its layer, that number, and what follows."""

    start: str
    layer: int
    rest: str


def _place(name: str) -> _Place | None:
    """Where a tensor lies; None outside of all layers."""
    before, separator, after = name.partition("layers.")
    number, dot, rest = after.partition(".")
    if not separator or not dot or not number.isdecimal() or (before and not before.endswith(".")):
        return None
    return _Place(f"{before}layers.{number}.", int(number), rest)


def rename(model: Any, config: Mapping[str, Any], weights: Weights) -> Weights:
    """A checkpoint's tensors under the names that a model's `sanitize` knows.

    Args:
        model: of mlx-lm, with parameters of the right shapes.
        config: its config.json.
        weights: the tensors; nothing is evaluated.
    """
    model_type = str(config.get("model_type"))
    if model_type in NOT_RENAMED or "quantization" in config:
        return weights
    names = []
    blocks: dict[int, dict[str, Shape]] = defaultdict(dict)
    for name, array in tree_flatten(model.parameters()):
        names.append(name)
        place = _place(name)
        if place:
            blocks[place.layer][place.rest] = array.shape
    table = text_config(dict(config))
    zero_experts = table.get("zero_expert_num") or 0
    first_shared = len(blocks) - (table.get("num_kv_shared_layers") or 0)
    target = _Model(model_type, zero_experts, first_shared, frozenset(names), blocks)
    for step in STEPS:
        weights = step(target, weights)
    return weights


def _unwrapped(model: _Model, weights: Weights) -> Weights:
    """The tensors without the names of what a model was wrapped in when it was saved."""
    weights = {INNER_WRAPPERS.sub("", name): array for name, array in weights.items()}
    for prefix in WRAPPERS:
        if weights and all(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): array for name, array in weights.items()}
    return weights


def _with_base(model: _Model, weights: Weights) -> Weights:
    """The tensors of a model that was saved without its head, as part of one that has one."""
    based = any(f".{name}".endswith(f".{BASE}{EMBEDDING}") for name in model.names)
    if EMBEDDING not in weights or not based:
        return weights
    return {name if name in model.names else BASE + name: array for name, array in weights.items()}


def _by_family(model: _Model, weights: Weights) -> Weights:
    """The tensors whose names only transformers' class of the family has."""
    known = model.names & weights.keys()
    return {
        family_name(model.model_type, name, known, model.names): array
        for name, array in weights.items()
    }


def _prefixed(model: _Model, weights: Weights) -> Weights:
    """A text model that was saved alone, with the prefix that it has inside the whole model."""
    alone = any(name.startswith("model.layers.") for name in weights)
    if model.model_type != "llama4" and not (alone and model.model_type in SAVED_ALONE):
        return weights

    def full_name(name: str) -> str:
        inner = re.sub(r"^model\.language_model\.", "model.", name)
        named = f"language_model.{inner}"
        known = named in model.names or inner.startswith("model.layers.")
        return named if known else name

    return {full_name(name): array for name, array in weights.items()}


def _without_zero_experts(model: _Model, weights: Weights) -> Weights:
    """The tensors without those of LongCat's experts that return what they read.

    transformers stores `gate_up_proj` of them, which nothing reads.
    """
    if not model.zero_experts:
        return weights
    result = {}
    for name, array in weights.items():
        place = _place(name)
        targets = _expert_targets(model, place.layer) if place else None
        if place and targets:
            count = targets["gate_proj"][1][0]
            number = place.rest.removeprefix("mlp.experts.").partition(".")[0]
            if number.isdecimal() and count <= int(number) < count + model.zero_experts:
                continue
            if place.rest in _FUSED and array.shape[0] == count + model.zero_experts:
                array = array[:count]
        result[name] = array
    return result


def _with_shared_keys(model: _Model, weights: Weights) -> Weights:
    """The tensors with zeros for projections of Gemma-3n's last layers that nothing reads.

    These layers take the keys and values of earlier ones; transformers 5 leaves the projections
    out, and mlx-lm's class can't do without.
    """
    if model.model_type != "gemma3n":
        return weights
    result = dict(weights)
    for name in model.names - weights.keys():
        place = _place(name)
        if place is None or place.rest not in _SHARED:
            continue
        sibling = weights.get(f"{place.start}self_attn.q_proj.weight")
        if sibling is not None and place.layer >= model.first_shared:
            shape = model.blocks[place.layer][place.rest]
            result[name] = mx.zeros(shape, dtype=sibling.dtype)
    return result


def _split_experts(model: _Model, weights: Weights) -> Weights:
    """The tensors with fused experts split, where the class doesn't read these itself."""
    result = dict(weights)
    for name in weights:
        place = _place(name)
        if place is None or place.rest not in _FUSED:
            continue
        down_name = name.replace("gate_up_proj", "down_proj")
        targets = _expert_targets(model, place.layer)
        if down_name not in weights or targets is None:
            continue
        columns_first = _columns_first(weights[name].shape, weights[down_name].shape, targets)
        if columns_first is None or columns_first is FUSED_ITSELF.get(model.model_type):
            continue

        gate_up, down = result.pop(name), result.pop(down_name)
        if columns_first:
            gate_up, down = gate_up.swapaxes(-1, -2), down.swapaxes(-1, -2)
        half = gate_up.shape[1] // 2
        parts = {
            "gate_proj": gate_up[:, :half],
            "up_proj": gate_up[:, half:],
            "down_proj": down,
        }
        for leaf, array in parts.items():
            if model.model_type not in SINGLE_EXPERTS:
                result[place.start + targets[leaf][0]] = array
                continue
            for expert in range(array.shape[0]):
                result[f"{place.start}mlp.experts.{expert}.{leaf}.weight"] = array[expert]
    return result


def _expert_targets(model: _Model, block: int) -> dict[str, tuple[str, Shape]] | None:
    """A block's stacked experts in the model: by projection, what follows the block's number, and
    the shape; None where it has no three of them."""
    targets: dict[str, tuple[str, Shape]] = {}
    for rest, shape in model.blocks.get(block, {}).items():
        leaf = rest.removesuffix(".weight").rpartition(".")[2]
        if len(shape) == 3 and rest.endswith(".weight") and leaf in _NAMES.values():
            targets[leaf] = (rest, shape)
    return targets if len(targets) == 3 else None


def _columns_first(
    gate_up: Shape, down: Shape, targets: Mapping[str, tuple[str, Shape]]
) -> bool | None:
    """Whether fused experts are (experts, inputs, outputs); None where no order fits the model."""
    experts, outputs, inputs = targets["gate_proj"][1]
    if targets["up_proj"][1] != (experts, outputs, inputs):
        return None
    if (gate_up, down) == ((experts, 2 * outputs, inputs), (experts, inputs, outputs)):
        return False
    if (gate_up, down) == ((experts, inputs, 2 * outputs), (experts, outputs, inputs)):
        return True
    return None


def numbered(first: str, second: str) -> tuple[str, int | None]:
    """The kind and the number of a single expert's layer, from the two parts of its name.

    Most have `3.gate_proj`; lists of linear layers (axolotl's Llama-4, unsloth's gpt-oss) have
    `gate_projs.3`. No number where it is no such name.
    """
    if second.isdecimal() and first.endswith("s"):
        return first[:-1], int(second)
    return second, int(first) if first.isdecimal() else None


def _stacked_experts(model: _Model, weights: Weights) -> Weights:
    """The tensors with single experts stacked, for classes that read fused ones only."""
    if model.model_type not in FUSED_ITSELF:
        return weights
    groups: dict[tuple[str, int, str], dict[int, str]] = defaultdict(dict)
    for name in weights:
        place = _place(name)
        match place.rest.split(".") if place else ():
            case [block, "experts", first, second, "weight"] if place and block in _BLOCKS:
                kind, number = numbered(first, second)
                if number is not None:
                    projection = _NAMES.get(kind, kind)
                    groups[place.start, place.layer, projection][number] = name

    result = dict(weights)
    for (start, layer, leaf), experts in groups.items():
        targets = _expert_targets(model, layer)
        if targets is None or leaf not in targets:
            continue
        rest, shape = targets[leaf]
        arrays = [weights[experts[e]] for e in range(shape[0]) if e in experts]
        if len(arrays) != len(experts) or any(array.shape != shape[1:] for array in arrays):
            continue
        if len(arrays) != shape[0]:
            continue
        for name in experts.values():
            del result[name]
        result[start + rest] = mx.stack(arrays)
    return result


def _split_convolutions(model: _Model, weights: Weights) -> Weights:
    """The tensors with the convolution of queries, keys and values split, where the model's is."""
    result: Weights = {}
    for name, array in weights.items():
        place = _place(name)
        before, separator, _ = place.rest.rpartition("conv1d.weight") if place else ("", "", "")
        shapes = model.blocks.get(place.layer, {}) if place else {}
        sizes = [shapes.get(f"{before}{kind}_proj.weight", (0,))[0] for kind in "qkv"]
        if not separator or name in model.names or sum(sizes) != array.shape[0] or not all(sizes):
            result[name] = array
            continue
        parts = mx.split(array, [sizes[0], sizes[0] + sizes[1]])
        for kind, part in zip("qkv", parts, strict=True):
            result[name.removesuffix("conv1d.weight") + f"{kind}_conv1d.weight"] = part
    return result


def _split_pairs(model: _Model, weights: Weights) -> Weights:
    """The tensors with the fused gate and up projections of MLPs split, where the model's are."""
    result: Weights = {}
    for name, array in weights.items():
        place = _place(name)
        shapes = model.blocks.get(place.layer, {}) if place else {}
        halves = _halves(place.rest, array.shape, shapes) if place else None
        if place is None or halves is None or place.rest in shapes:
            result[name] = array
            continue
        for leaf, half in zip(halves, mx.split(array, 2), strict=True):
            result[place.start + leaf] = half
    return result


def _halves(rest: str, shape: Shape, shapes: Mapping[str, Shape]) -> list[str] | None:
    """What the two halves of a fused gate and up projection are called in a block, or None."""
    before, separator, after = rest.rpartition("gate_up_proj.weight")
    if not separator or after or len(shape) != 2:
        return None
    for other in (before, *(name.removesuffix("x") for name in _alternatives(f"{before}x"))):
        leaves = [f"{other}gate_proj.weight", f"{other}up_proj.weight"]
        if all(shapes.get(leaf) == (shape[0] // 2, shape[1]) for leaf in leaves):
            return leaves
    return None


def _other_blocks(model: _Model, weights: Weights) -> Weights:
    """The tensors of routers and of MLPs, whose block is called otherwise in the model."""
    result: Weights = {}
    for name, array in weights.items():
        place = _place(name)
        shapes = model.blocks.get(place.layer, {}) if place else {}
        new_name = name
        if place is not None and shapes and place.rest not in shapes:
            choices = [
                rest
                for rest in _alternatives(place.rest)
                if shapes.get(rest) == array.shape and place.start + rest not in weights
            ]
            if len(choices) == 1:
                new_name = place.start + choices[0]
        result[new_name] = array
    return result


def _alternatives(rest: str) -> Iterator[str]:
    """Other names of a tensor inside a block."""
    block, _, leaf = rest.partition(".")
    if block not in _BLOCKS:
        return
    leaves = [leaf] + [
        new + leaf.removeprefix(old) for old, new in _ROUTERS if leaf.startswith(old)
    ]
    names = (f"{name}.{other}" for name in _BLOCKS for other in dict.fromkeys(leaves))
    yield from (name for name in names if name != rest)


STEPS = (
    _unwrapped,
    _with_base,
    _by_family,
    _prefixed,
    _without_zero_experts,
    _with_shared_keys,
    _split_experts,
    _split_pairs,
    _split_convolutions,
    _stacked_experts,
    _other_blocks,
)
