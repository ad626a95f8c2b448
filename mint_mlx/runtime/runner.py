"""Loads a model to run it for measurements, and runs it up to its head or from there.

On a GPU a model runs in its own types. MLX's CPU backend has no fast quantized matrix product, so
on a CPU every quantized weight is dequantized once, to float32, and the replacements of cpu_ops.py
and fast_math.py are used. The blocks of a model larger than memory stay on disk until they are run
(blocks.py); those of a quantized one can stay packed, and are dequantized whenever they are used.

The stock model runs; what is patched temporarily stands in patching.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from ..base.distributed import ranks
from ..base.hf_config import HALVES, stated_dtype
from ..base.safetensors_header import read_folder
from ..checkpoint import mlxlm
from ..checkpoint.layers import MLX_DTYPES
from ..checkpoint.stored_dtype import with_stored_dtype
from . import patching
from .cpu_ops import GroupedSwitchLinear
from .device import NARROW, fit_blas, keep_freed_memory, on_cpu
from .memory import fits_here

LOGITS = 1 << 25  # logits computed at once: 128 MiB in float32
# Layers that can stay packed on a CPU. (What follows an embedding must be float32.)
PACKED = ("QuantizedLinear", "QuantizedMultiLinear", "QuantizedSwitchLinear")


@dataclass
class Runner:
    """A model ready to be measured on this device.

    Attributes:
        model: the mlx-lm model.
        trunk: its module that holds the blocks; the head comes after it.
        block_list: the name of the trunk's list of blocks.
        streamed: whether the blocks are read, run on all windows and dropped, one after the other.
        folder: where it was loaded from.
        instead_of_half: the type of what is stored in float16; None where it stays (or all is
            float32, on a CPU).
    """

    model: nn.Module
    trunk: nn.Module
    block_list: str
    streamed: bool
    folder: Path
    instead_of_half: mx.Dtype | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order of the model."""
        return list(self.trunk[self.block_list])


def load_runner(
    folder: Path,
    streamed: bool | None = None,
    dtype: str | None = None,
    written: Mapping[str, str] | None = None,
    packed: bool = False,
) -> Runner:
    """Load a checkpoint for measuring.

    Args:
        folder: the checkpoint.
        streamed: whether blocks stay on disk; by default where the model is larger than memory.
        dtype: the 16-bit type that it will be written in; what its config.json states by default.
        written: safetensors codes by parameter: these are cast to them before anything runs.
        packed: leave quantized weights packed on a CPU where the model fits in memory only so; its
            products are to be those of cpu_ops.dense_products then.
    """
    keep_freed_memory()
    model = mlxlm.build_model(folder)
    if written is not None:
        _cast(model, written)
    trunk, block_list = find_trunk(model)
    packed = packed and on_cpu() and not _fits(model)
    if streamed is None:
        streamed = not _fits(model, packed)
    runner = Runner(model, trunk, block_list, streamed, folder, _instead_of_half(folder, dtype))

    on_disk = runner.blocks if streamed else []
    skip = {id(module) for block in on_disk for module in block.modules()}
    _make_ready(model, skip, runner.instead_of_half, packed and not streamed)
    widths = [leaf.weight.shape[-1] for _, leaf in _leaves(model) if type(leaf) is nn.Embedding]
    fit_blas(max(widths, default=NARROW))
    return runner


def _cast(model: nn.Module, written: Mapping[str, str]) -> None:
    """Cast a lazy model's parameters to the types that they will be written in."""
    with mx.stream(mx.cpu):
        arrays = [
            (name, array.astype(getattr(mx, MLX_DTYPES[written[name]])))
            for name, array in tree_flatten(model.parameters())
            if written.get(name) in HALVES.values() and _is_float(array)
        ]
    model.update(tree_unflatten(arrays))


def _instead_of_half(folder: Path, dtype: str | None) -> mx.Dtype | None:
    """The type of what a checkpoint stores in float16, where bfloat16 is asked for or stated.

    That is how one is converted whose activations overflow float16.
    """
    if on_cpu():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = with_stored_dtype(config, read_folder(folder))
    wanted = stated_dtype(config) if dtype is None else HALVES[dtype]
    return mx.bfloat16 if wanted == "BF16" else None


def fits(folder: Path, packed: bool = False) -> bool:
    """Whether this machine runs a checkpoint's model whole, not block by block.

    Args:
        folder: the checkpoint.
        packed: as of `load_runner`.
    """
    return _fits(mlxlm.build_model(folder), packed)


def _fits(model: nn.Module, packed: bool = False) -> bool:
    return fits_here(_bytes_needed(model, packed))


def load_shared(folder: Path) -> Runner:
    """As `load_runner`, but under several ranks mlx-lm splits the model over them.

    All of them see its whole output.

    Raises:
        MintError: mlx-lm can't split this model.
    """
    if ranks().size == 1:
        return load_runner(folder)
    model = mlxlm.sharded_model(folder)
    if on_cpu():
        model.set_dtype(mx.float32)  # gather_mm takes nothing else there
    return Runner(model, model.model, "layers", False, folder)


def load_block(runner: Runner, block: nn.Module) -> None:
    """Read a block's weights where the model is streamed."""
    if runner.streamed:
        _make_ready(block, set(), runner.instead_of_half)


def release_block(runner: Runner, block: nn.Module) -> None:
    """Drop a block's weights where the model is streamed.

    Only another load of the model brings them back.
    """
    if runner.streamed:
        for _, leaf in _leaves(block):
            leaf.clear()
        mx.clear_cache()


def layer_names(runner: Runner) -> dict[int, str]:
    """Paths of all layers, by the id of the module (which changes when its block is loaded)."""
    return {id(module): path for path, module in _leaves(runner.model)}


def make_dense(runner: Runner, paths: Collection[str]) -> dict[str, nn.Module]:
    """These layers by path, with weights that can be replaced: quantized ones become dense."""
    dense = [
        (path, _dense(leaf))
        for path, leaf in _leaves(runner.model)
        if path in paths and "scales" in leaf
    ]
    runner.model.update_modules(tree_unflatten(dense))
    return {path: leaf for path, leaf in _leaves(runner.model) if path in paths}


def trunk_output(runner: Runner, tokens: mx.array) -> mx.array:
    """The trunk's output (windows, tokens, hidden)."""
    try:
        caches = _shared_caches(runner.model)
        args, kwargs = patching.arguments_of(runner.trunk, lambda: runner.model(tokens, **caches))
    except patching.NotCalled:
        raise ValueError("the model never calls the module that holds its blocks") from None
    return runner.trunk(*args, **kwargs)


def trunk_output_from(runner: Runner, tokens: mx.array, hidden: mx.array) -> mx.array:
    """The trunk's output from that of its last block: what comes between (a norm) is done.

    Raises:
        ValueError: the trunk calls a block twice.
    """
    with patching.returning_once(runner.blocks, hidden):
        return trunk_output(runner, tokens)


def logits_of(runner: Runner, tokens: mx.array, top: mx.array) -> mx.array:
    """What the head predicts from the trunk's output `top`, float32 (windows, tokens, vocabulary).

    It is computed in 32 bits: logits of 16 would be rounded by up to a sixteenth.
    """
    with patching.returning([runner.trunk], top.astype(mx.float32)):
        return runner.model(tokens).astype(mx.float32)


def _shared_caches(model: nn.Module) -> dict[str, list[Any]]:
    """The argument without which a model's last layers don't find the keys of earlier ones.

    Gemma-3n's class looks for them in the prompt cache alone; where it has none, these layers use
    projections that were never trained.
    """
    if not any(getattr(m, "is_kv_shared_layer", False) for _, m in model.named_modules()):
        return {}
    return {"cache": make_prompt_cache(model)}


def _bytes_needed(model: nn.Module, packed: bool) -> int:
    """Memory of the whole model as it will be run; `packed` as of `load_runner`."""
    total = 0
    for _, module in _leaves(model):
        stored = {name: array.nbytes for name, array in tree_flatten(module.parameters())}
        total += sum(stored.values())
        stays = packed and type(module).__name__ in PACKED
        if not on_cpu() or stays or "weight" not in module:
            continue
        # On a CPU a quantized weight is counted in both forms, any other in float32.
        if "scales" in module:
            total += 4 * (module.weight.size * 32 // module.bits)
        else:
            total += 4 * module.weight.size - module.weight.nbytes
    return total


def find_trunk(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the longest list of blocks, and that list's name."""
    longest = 0
    trunk: tuple[nn.Module, str] | None = None
    for _, module in model.named_modules():
        for name, child in module.items():
            is_list = isinstance(child, list) and all(isinstance(c, nn.Module) for c in child)
            if is_list and len(child) > longest:
                longest = len(child)
                trunk = module, name
    if trunk is None:
        raise ValueError("the model holds no list of blocks")
    return trunk


def _leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules without modules of their own, by path."""
    leaves = tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, nn.Module)]


def _make_ready(
    module: nn.Module,
    skip: set[int],
    instead_of_half: mx.Dtype | None,
    packed: bool = False,
) -> None:
    """Read a module's weights; on a CPU replace its layers with dense float32 ones one by one.

    Args:
        module: the model or a block.
        skip: ids of the modules to leave as they are.
        instead_of_half: the type of what is float16; None leaves it.
        packed: leave layers of PACKED as they are stored.
    """
    make_float = on_cpu()

    def in_type(array: mx.array) -> mx.array:
        if make_float and _is_float(array):
            return array.astype(mx.float32)
        if instead_of_half is not None and array.dtype == mx.float16:
            return array.astype(instead_of_half)
        return array

    dense = []
    for path, leaf in _leaves(module):
        if id(leaf) in skip:
            continue
        stays = packed and type(leaf).__name__ in PACKED
        ready = _dense(leaf) if make_float and not stays and "weight" in leaf else leaf
        mx.eval(ready.parameters())
        if ready is not leaf:
            dense.append((path, ready))
            leaf.clear()  # so that the weight isn't held twice
    module.update_modules(tree_unflatten(dense))

    # Parameters that stand beside modules, such as A_log.
    for _, child in module.named_modules():
        if id(child) in skip or (packed and type(child).__name__ in PACKED):
            continue
        for name, value in child.items():
            if isinstance(value, mx.array):
                child[name] = in_type(value)
                mx.eval(child[name])


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _dense(module: nn.Module) -> nn.Module:
    """A quantized or switch layer as a dense float32 one; any other module as it is."""
    switch = GroupedSwitchLinear if on_cpu() else SwitchLinear
    target = {
        "QuantizedLinear": nn.Linear,
        "QuantizedEmbedding": nn.Embedding,
        "QuantizedMultiLinear": MultiLinear,
        "QuantizedSwitchLinear": switch,
        "SwitchLinear": switch,
        "Linear": nn.Linear,
        "Embedding": nn.Embedding,
        "MultiLinear": MultiLinear,
    }.get(type(module).__name__)
    if target is None:
        return module

    # Without __init__, which would make a random weight first.
    dense = target.__new__(target)
    nn.Module.__init__(dense)
    dense.weight = _restore(module) if "scales" in module else module.weight.astype(mx.float32)
    if "bias" in module:
        dense.bias = module.bias.astype(mx.float32)
    return dense


def _restore(module: nn.Module) -> mx.array:
    """A quantized module's weight, computed in the type of its scales, in float32."""
    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        module.group_size,
        module.bits,
        mode=module.mode,
    )
    return weight.astype(mx.float32)
