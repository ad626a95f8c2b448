"""The layers of a model: every module that can be quantized, with its role, shape and guards.

A layer's name is its module path in the mlx-lm model. All experts of one projection in one block
are one layer, since MLX holds them in one tensor with one configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from ..base.errors import MintError
from ..base.hf_config import config_tables, stated_dtype
from ..base.quant_config import KEEP, QuantConfig
from .block_path import block_of
from .layout import Layout, TensorSpec, make_layout, weight_tensors
from .roles import EXPERTS, GATES, TOWER, role_of

ROUTER_BITS = 8
FLOATS = ("F16", "BF16", "F32")
# Names of the number of experts that a token uses, in configs and in mlx-lm's classes.
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)


@dataclass(frozen=True)
class Layer:
    """One quantizable module.

    Attributes:
        path: module path in the mlx-lm model.
        shape: of the unquantized weight, experts or heads first.
        dtype: safetensors code of the weight (and of its scales) as it will be written.
        kind: `linear`, `embedding`, `experts` or `multi-linear`.
        role: see roles.py.
        extras: other tensors of the module (a bias), written unquantized.
        reads: share of the layer's bytes that decoding one token reads.
        floor: fewest bits that the guards allow.
        keep: why the guards leave it unquantized, or ''.
        class_config: what the model class's own predicate asks for (a router's 8 bits), or None.
        stored: its configuration where the source is quantized already.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    role: str
    extras: tuple[TensorSpec, ...] = ()
    reads: float = 1.0
    floor: int = 0
    keep: str = ""
    class_config: QuantConfig | None = None
    stored: QuantConfig | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def experts(self) -> int:
        """How many experts it holds; 1 for a layer without experts."""
        return self.shape[0] if self.kind == "experts" else 1

    @property
    def as_experts(self) -> tuple[int, int, int]:
        """The weight's shape as (experts or heads, rows, columns)."""
        return prod(self.shape[:-2]), self.shape[-2], self.shape[-1]

    @property
    def block(self) -> int | None:
        return block_of(self.path)

    def tensors(self, config: QuantConfig) -> tuple[TensorSpec, ...]:
        """All tensors of the module as written under a configuration."""
        return weight_tensors(self.path, self.shape, self.dtype, config) + self.extras

    @cached_property
    def _costs(self) -> dict[QuantConfig, int]:
        return {}

    def bytes(self, config: QuantConfig) -> int:
        """What the layer costs on disk, its header entries included."""
        if config not in self._costs:
            self._costs[config] = sum(spec.file_bytes for spec in self.tensors(config))
        return self._costs[config]

    def objection(self, config: QuantConfig) -> str | None:
        """Why the guards don't allow a configuration for this layer, or None."""
        if not config.quantized:
            return None
        if config.global_scale and config != self.stored:
            return f"only codes that a source holds stay {config}: mint-mlx makes none"
        if self.keep:
            return self.keep
        # What a source stores below the floor has lost it already: more bits bring nothing back.
        if config.bits < self.floor and config != self.stored:
            return f"a {self.role.replace('_', ' ')} needs {self.floor} bits or more"
        return None


@dataclass(frozen=True)
class Inventory:
    """Everything that a written checkpoint holds, in the model's own order.

    Attributes:
        layers: the quantizable modules.
        others: all other tensors, grouped by the module that owns them.
        order: module paths of both, in the order of the model.
        carried: those of `others` that mlx-lm's model lacks, copied from the source as they are:
            towers, and blocks for multi-token prediction (towers.py).
    """

    layers: tuple[Layer, ...]
    others: dict[str, tuple[TensorSpec, ...]]
    order: tuple[str, ...]
    carried: tuple[str, ...] = ()

    @property
    def towers(self) -> tuple[str, ...]:
        """Those carried along that belong to a tower."""
        return tuple(owner for owner in self.carried if self._is_tower(owner))

    @property
    def beside(self) -> tuple[str, ...]:
        """Those carried along in a file beside the model's, which stock loaders don't look at."""
        return tuple(owner for owner in self.carried if not self._is_tower(owner))

    @property
    def coded(self) -> dict[str, int]:
        """Those beside that are codes of 8 bits (mtp_codes.py), with how many weights each has."""
        words = [
            (owner, s) for owner in self.beside for s in self.others[owner] if s.dtype == "U32"
        ]
        return {owner: 4 * prod(spec.shape) for owner, spec in words}

    def _is_tower(self, owner: str) -> bool:
        return any(TOWER.search(spec.name) for spec in self.others[owner])

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        coded = self.coded
        tensors = [spec for o, specs in self.others.items() if o not in coded for spec in specs]
        tensors += [spec for layer in self.layers for spec in layer.extras]
        weights = [*coded.values(), *(layer.size for layer in self.layers)]
        return sum(weights) + sum(prod(spec.shape) for spec in tensors)

    @property
    def other_bytes(self) -> int:
        """Bytes on disk of all tensors that belong to no layer."""
        return sum(spec.file_bytes for specs in self.others.values() for spec in specs)

    @property
    def blocks(self) -> int:
        return 1 + max(
            (layer.block for layer in self.layers if layer.block is not None), default=-1
        )

    def units(self, choice: dict[str, QuantConfig]) -> Iterable[tuple[str, tuple[TensorSpec, ...]]]:
        """Every module's tensors under a choice of configurations; layers not in it are `keep`."""
        layers = {layer.path: layer for layer in self.layers}
        for path in self.order:
            layer = layers.get(path)
            yield path, layer.tensors(choice.get(path, KEEP)) if layer else self.others[path]

    def layout(self, choice: dict[str, QuantConfig]) -> Layout:
        """Shards, headers and places of a checkpoint with these configurations."""
        beside = set(self.beside)
        model = [specs for path, specs in self.units(choice) if path not in beside]
        return make_layout(model, beside=[self.others[path] for path in self.beside])

    def active_bytes(self, choice: dict[str, QuantConfig]) -> int:
        """Bytes that decoding one token reads.

        All dense layers, k of E experts, one row of an untied embedding; nothing that mlx-lm lacks.
        """
        total = 0
        carried = set(self.carried)
        for owner, specs in self.others.items():
            if owner not in carried:
                total += sum(spec.nbytes for spec in specs)
        for layer in self.layers:
            specs = layer.tensors(choice.get(layer.path, KEEP))
            total += round(layer.reads * sum(spec.nbytes for spec in specs))
        return total


def list_layers(model: Any, config: dict[str, Any]) -> Inventory:
    """List the layers and the other tensors of a (lazy) mlx-lm model. No weight is evaluated.

    Args:
        model: an instantiated mlx-lm model.
        config: its config.json.

    Raises:
        MintError: a layer's weights are of a type that can't be quantized.
    """
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    target = _target_dtype(model, config)
    owned: dict[str, dict[str, TensorSpec]] = {}
    for name, array in tree_flatten(model.parameters()):
        owner, _, local = name.rpartition(".")
        dtype = target(name, _code(array))
        owned.setdefault(owner, {})[local] = TensorSpec(name, dtype, tuple(array.shape))

    # Which blocks hold experts decides whether a `gate` is a router.
    modules = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    quantizable = {path: module for path, module in modules.items() if _quantizable(module)}
    expert_blocks = {
        _parent(path) for path, module in quantizable.items() if _kind(module) == "experts"
    }

    owners = dict(model.named_modules())
    predicate = getattr(model, "quant_predicate", None)
    layers = []
    for path, module in quantizable.items():
        kind = _kind(module)
        has_experts = any(_same_block(path, parent) for parent in expert_blocks)
        owner = type(owners.get(_parent(path))).__name__
        role = role_of(path, kind, has_experts, owner)
        layer = _make_layer(path, module, kind, role, owned[path])
        if layer.role in EXPERTS:
            layer = replace(layer, reads=_experts_read(model, config, path, layer.shape[0]))
        layers.append(_guard(layer, predicate(path, module) if predicate else True))

    # Without a head the embedding is the head too, and each token reads all of it. It is the first
    # one; further embeddings are of positions or lie in blocks.
    if not any(layer.role == "head" for layer in layers):
        tied = next((layer for layer in layers if layer.role == "embedding"), None)
        layers = [replace(layer, reads=1.0) if layer is tied else layer for layer in layers]

    others = {
        owner: tuple(specs.values()) for owner, specs in owned.items() if owner not in quantizable
    }
    return Inventory(tuple(layers), others, tuple(owned))


# Safetensors codes by MLX's names of types.
_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}
MLX_DTYPES = {code: name for name, code in _CODES.items()}
NEVER_CAST = ("A_log", "correction_bias", "expert_bias")  # how such parameters' names end


def _code(array: Any) -> str:
    return _CODES[str(array.dtype).rpartition(".")[2]]


def _target_dtype(model: Any, config: dict[str, Any]) -> Callable[[str, str], str]:
    """The function from a parameter's name and type to the type that it is written in.

    Types are as mlx-lm casts them, except that float32 becomes bfloat16 (scales cost half). The
    decay of a linear attention (`A_log`) and what routers add to their scores, a handful of numbers
    each, stay float32 even where mlx-lm would cast them: biases of 8 that differ by hundredths
    choose by these.
    """
    wanted = stated_dtype(config)
    is_cast = getattr(model, "cast_predicate", None) or (lambda _: True)

    def target(name: str, dtype: str) -> str:
        if dtype not in FLOATS or not is_cast(name) or name.endswith(NEVER_CAST):
            return dtype
        return wanted or ("BF16" if dtype == "F32" else dtype)

    return target


def _quantizable(module: Any) -> bool:
    """Whether a module has `to_quantized` or is quantized already (and may lack it)."""
    return "weight" in module and (
        hasattr(module, "to_quantized") or ("scales" in module and hasattr(module, "bits"))
    )


def _kind(module: Any) -> str:
    """The kind of a layer (see Layer) by the class of its module."""
    name = type(module).__name__.removeprefix("Quantized")
    if name == "Embedding":
        return "embedding"
    return {"SwitchLinear": "experts", "MultiLinear": "multi-linear"}.get(name, "linear")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _same_block(path: str, other: str) -> bool:
    """Whether two modules share a block."""
    return block_of(path) is not None and block_of(path) == block_of(other + ".")


def _make_layer(
    path: str, module: Any, kind: str, role: str, owned: dict[str, TensorSpec]
) -> Layer:
    """A layer from its module, before guards.

    Raises:
        MintError: its weights are of a type that can't be quantized.
    """
    weight = owned["weight"]
    if weight.dtype not in FLOATS and not hasattr(module, "bits"):
        raise MintError(
            f"{path} has weights of type {weight.dtype}, which no quantizer reads: give the "
            "checkpoint in bf16"
        )

    # A quantized module's weight holds packed codes: its true shape and type follow from them.
    shape = weight.shape
    dtype = weight.dtype
    stored = None
    packed = {"weight"}
    if hasattr(module, "bits"):
        has_global = "global_scale" in owned
        stored = QuantConfig(module.bits, module.group_size, module.mode, has_global)
        shape = (*shape[:-1], shape[-1] * 32 // module.bits)
        dtype = owned["scales"].dtype if stored.mode == "affine" else "BF16"
        packed |= {"scales", "biases", "global_scale"}
    extras = tuple(spec for name, spec in owned.items() if name not in packed)
    reads = 1 / shape[0] if kind == "embedding" else 1.0
    return Layer(path, shape, dtype, kind, role, extras, reads=reads, stored=stored)


def _guard(layer: Layer, wanted: bool | dict[str, Any]) -> Layer:
    """A layer with the guards applied.

    Args:
        layer: the layer.
        wanted: what the model class's own quant_predicate returned for it.
    """
    if TOWER.search(layer.path):
        return replace(layer, keep="it belongs to a tower")
    outputs = layer.shape[-2]
    few = layer.kind == "linear" and outputs < 8 and layer.role != "head"
    if few or (layer.role in GATES and outputs % 8):
        why = f"a gate with {outputs} outputs (not a multiple of 8) is slow when quantized"
        return replace(layer, keep=why)
    if wanted is False:
        return replace(layer, keep="mlx-lm's model class leaves it unquantized")
    if layer.role != "router":
        return layer

    # A router never gets fewer than ROUTER_BITS, nor fewer than its model class asks for.
    asked = None
    if isinstance(wanted, dict) and wanted.get("bits", 0) >= ROUTER_BITS:
        asked = QuantConfig(
            wanted["bits"], wanted.get("group_size", 64), wanted.get("mode", "affine")
        )
    return replace(layer, floor=asked.bits if asked else ROUTER_BITS, class_config=asked)


def _experts_read(model: Any, config: dict[str, Any], path: str, experts: int) -> float:
    """The share of experts that a token uses; 1 where neither model nor config say it."""
    holders: list[Any] = []
    module = model
    for name in path.split(".")[:-1]:
        module = module[int(name)] if name.isdigit() else getattr(module, name)
        holders.append(module)

    # The modules above the experts know it best, the nearest first.
    for holder in reversed(holders):
        for owner in (holder, getattr(holder, "args", None), getattr(holder, "config", None)):
            for key in _TOP_K:
                value = getattr(owner, key, None)
                if type(value) is int and 0 < value <= experts:
                    return value / experts
    for table in (*config_tables(config), config.get("ffn_config") or {}):
        for key in _TOP_K:
            if type(table.get(key)) is int and 0 < table[key] <= experts:
                return int(table[key]) / experts
    return 1.0
