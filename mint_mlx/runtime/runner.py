"""Runs a model's forward pass for measuring: in its own types on a GPU, densely in float32 on a
CPU.

MLX's CPU backend has no fast quantized matrix product, so on a CPU every quantized weight is
dequantized once, and cpu.py stands in for what else is slow there. A model larger than memory is
run block by block, all windows at once.

No family's code is copied: the stock model runs, with the `__call__` of its trunk, its blocks or
its experts wrapped for a moment. cpu.py, taps.py, blocks.py and converters/turns.py patch likewise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from ..base.distributed import ranks
from ..base.errors import MintError
from ..checkpoint import mlxlm
from .cpu_ops import GroupedSwitchLinear, keep_freed_memory, on_cpu
from .fast_math import fast_math
from .memory import fits_here
from .patching import Call, returning, wrapped, wrapped_all

LOGITS = 1 << 25  # logits computed at once: 128 MiB in float32


@dataclass
class Runner:
    """A model ready to be measured on this device.

    Attributes:
        model: the mlx-lm model.
        trunk: its module that holds the blocks; the head comes after it.
        blocks: the name of the trunk's list of blocks.
        streamed: whether the blocks are read, run on all windows and dropped, one after the other.
        folder: where it was loaded from.
    """

    model: nn.Module
    trunk: nn.Module
    blocks: str
    streamed: bool
    folder: Path


@dataclass
class Piece:
    """Logits of some windows at some positions, float32 (windows, positions, vocabulary)."""

    rows: slice
    columns: slice
    logits: mx.array


@dataclass
class Routing:
    """Which experts each token took: int (windows, tokens, k), sorted, by expert layer in the order
    of the model.
    """

    layers: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def arrays(self, shape: tuple[int, int]) -> list[np.ndarray]:
        """The choices of all windows, for windows x tokens of this shape."""
        return [np.concatenate(parts).reshape(*shape, -1) for parts in self.layers.values()]


def load_runner(folder: Path, streamed: bool | None = None) -> Runner:
    """Load a checkpoint for measuring. Where it is larger than memory (or `streamed` says so),
    blocks stay on disk.
    """
    keep_freed_memory()
    model = mlxlm.build_model(folder)
    trunk, name = _trunk(model)
    if streamed is None:
        streamed = not _fits(model)
    runner = Runner(model, trunk, name, streamed, folder)
    skip = (
        {id(module) for block in trunk[name] for module in block.modules()} if streamed else set()
    )
    _make_ready(model, skip)
    return runner


def fits(folder: Path) -> bool:
    """Whether a checkpoint's model is run whole here, not block by block."""
    return _fits(mlxlm.build_model(folder))


def _fits(model: Any) -> bool:
    return fits_here(_bytes_needed(model))


def load_shared(folder: Path) -> Runner:
    """The same; under several ranks mlx-lm splits the model over them instead, and all of them see
    its output.

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
        _make_ready(block, set())


def release_block(runner: Runner, block: nn.Module) -> None:
    """Drop a block's weights where the model is streamed; only another load of the model brings
    them back.
    """
    if runner.streamed:
        for _, leaf in _leaves(block):
            leaf.clear()
        mx.clear_cache()


def layer_names(runner: Runner) -> dict[int, str]:
    """Paths of all layers, by the id of the module."""
    return {id(module): path for path, module in _leaves(runner.model)}


def make_dense(runner: Runner, paths: Collection[str]) -> dict[str, Any]:
    """These layers by path, with weights that can be replaced: those that are quantized become
    dense ones.
    """
    dense = [
        (path, _dense(leaf))
        for path, leaf in _leaves(runner.model)
        if path in paths and "scales" in leaf
    ]
    runner.model.update_modules(tree_unflatten(dense))
    return {path: leaf for path, leaf in _leaves(runner.model) if path in paths}


def _bytes_needed(model: nn.Module) -> int:
    """Memory of the whole model as it will be run."""
    total = 0
    for _, module in _leaves(model):
        for _, array in tree_flatten(module.parameters()):
            total += array.nbytes
        if on_cpu() and "weight" in module:
            size = (
                module.weight.size * 32 // module.bits if "scales" in module else module.weight.size
            )
            total += 4 * size - (0 if "scales" in module else module.weight.nbytes)
    return total


def _trunk(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the longest list of blocks, and that list's name."""
    best: tuple[int, nn.Module | None, str] = (0, None, "")
    for _, module in model.named_modules():
        for name, child in module.items():
            if (
                isinstance(child, list)
                and len(child) > best[0]
                and all(isinstance(c, nn.Module) for c in child)
            ):
                best = (len(child), module, name)
    if best[1] is None:
        raise ValueError("the model holds no list of blocks")
    return best[1], best[2]


def _leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (k, m)
        for k, m in tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)
        if isinstance(m, nn.Module)
    ]


def _make_ready(module: nn.Module, skip: set[int]) -> None:
    """Read a module's weights; on a CPU replace its layers with dense float32 ones one by one."""
    dense_here = on_cpu()
    dense = []
    for path, leaf in _leaves(module):
        if id(leaf) in skip:
            continue
        ready = _dense(leaf) if dense_here and "weight" in leaf else leaf
        mx.eval(ready.parameters())
        if ready is not leaf:
            dense.append((path, ready))
            leaf.clear()
    module.update_modules(tree_unflatten(dense))
    for _, child in module.named_modules():  # parameters that sit beside modules, such as A_log
        if id(child) not in skip:
            for name, value in child.items():
                if isinstance(value, mx.array):
                    child[name] = (
                        value.astype(mx.float32) if dense_here and _is_float(value) else value
                    )
                    mx.eval(child[name])


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _dense(module: Any) -> Any:
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
    new = target.__new__(target)
    nn.Module.__init__(new)
    new.weight = _restore(module) if "scales" in module else module.weight.astype(mx.float32)
    if "bias" in module:
        new.bias = module.bias.astype(mx.float32)
    return new


def _restore(module: Any) -> mx.array:
    """The weight of a quantized module as `mx.dequantize` defines it (in the type of its scales),
    in float32.
    """
    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        module.group_size,
        module.bits,
        mode=module.mode,
    )
    return weight.astype(mx.float32)


def forward(
    runner: Runner, tokens: np.ndarray, batch: int, routing: Routing | None = None
) -> Iterator[Piece]:
    """Run windows of tokens through a model and yield their logits piece by piece, never more than
    LOGITS at once.

    Args:
        runner: a loaded model.
        tokens: int (windows, tokens).
        batch: windows at once.
        routing: receives the choice of experts, where the model has any.
    """
    if runner.streamed:
        with _recorded(routing), fast_math(runner.model):
            hidden = _streamed_hidden(runner, mx.array(tokens), batch)
        for start in range(0, len(tokens), batch):
            rows = slice(start, min(start + batch, len(tokens)))
            yield from _head(runner, tokens, rows, hidden[rows])
        return
    for start in range(0, len(tokens), batch):
        rows = slice(start, min(start + batch, len(tokens)))
        with _recorded(routing), fast_math(runner.model):
            hidden = trunk_output(runner, mx.array(tokens[rows]))
            mx.eval(hidden)
        yield from _head(runner, tokens, rows, hidden)
        mx.clear_cache()


def _head(runner: Runner, tokens: np.ndarray, rows: slice, hidden: mx.array) -> Iterator[Piece]:
    """What the model does after its trunk, position by position."""
    length, step, start = tokens.shape[1], 1, 0
    while start < length:
        columns = slice(start, min(start + step, length))
        logits = logits_of(runner, mx.array(tokens[rows, columns]), hidden[:, columns])
        yield Piece(rows, columns, logits)
        start = columns.stop
        step = max(
            1, LOGITS // (logits.shape[0] * logits.shape[-1])
        )  # known after the first position


def logits_of(runner: Runner, tokens: mx.array, top: mx.array) -> mx.array:
    """What the head predicts from the trunk's output `top`, float32 (windows, tokens, vocabulary).

    It is computed in 32 bits: logits of 16 would be rounded by up to a sixteenth.
    """
    with wrapped(type(runner.trunk), returning(runner.trunk, top.astype(mx.float32))):
        logits: mx.array = runner.model(tokens).astype(mx.float32)
    return logits


class _Trunk(Exception):
    """Carries the trunk's output out of the model's own forward pass."""

    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden


def trunk_output(runner: Runner, tokens: mx.array) -> Any:
    """The trunk's output (windows, tokens, hidden)."""

    def stop(call: Call) -> Call:
        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = call(self, *args, **kwargs)
            if self is runner.trunk:
                raise _Trunk(out)
            return out

        return replaced

    with wrapped(type(runner.trunk), stop):
        try:
            runner.model(tokens)
        except _Trunk as caught:
            return caught.hidden
    raise ValueError("the model never calls the module that holds its blocks")


def trunk_output_from(runner: Runner, tokens: mx.array, hidden: mx.array) -> mx.array:
    """The trunk's output from that of its last block: what comes between (a norm) is done.

    Raises:
        ValueError: the trunk calls a block twice.
    """
    left = {id(block) for block in runner.trunk[runner.blocks]}
    blocks = left.copy()

    def stub(call: Call) -> Call:
        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in blocks:
                return call(self, *args, **kwargs)
            if id(self) not in left:
                raise ValueError("a block is called more than once")
            left.remove(id(self))
            return hidden

        return replaced

    with wrapped_all({type(block) for block in runner.trunk[runner.blocks]}, stub):
        out: mx.array = trunk_output(runner, tokens)
    return out


def _streamed_hidden(runner: Runner, tokens: mx.array, batch: int) -> Any:
    """As `trunk_output` for all windows, each block read when it is called and dropped after its
    last window.
    """
    blocks = {id(block) for block in runner.trunk[runner.blocks]}
    count, gone = len(tokens), set()

    def by_block(call: Call) -> Call:
        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in blocks:
                return call(self, *args, **kwargs)
            if id(self) in gone or not all(map(_plain, (*args, *kwargs.values()))):
                raise MintError(
                    f"{runner.folder.name} keeps state between its blocks or calls one twice, so "
                    "it cannot be run block by block: it needs a machine with memory for the "
                    "whole model"
                )
            gone.add(id(self))
            load_block(runner, self)
            parts = []
            for start in range(0, count, batch):

                def cut(value: Any, start: int = start) -> Any:
                    if isinstance(value, tuple):
                        return tuple(cut(item, start) for item in value)
                    whole = (
                        isinstance(value, mx.array) and value.ndim > 2 and value.shape[0] == count
                    )
                    return value[start : start + batch] if whole else value

                parts.append(call(self, *map(cut, args), **{k: cut(v) for k, v in kwargs.items()}))
                mx.eval(parts[-1])
            out = _joined(parts)
            mx.eval(out)
            release_block(runner, self)
            return out

        return replaced

    kinds = {type(block) for block in runner.trunk[runner.blocks]}
    with wrapped_all(kinds, by_block):
        hidden = trunk_output(runner, tokens)
        mx.eval(hidden)
    return hidden


def _plain(value: Any) -> bool:
    """Whether a block's argument can be cut into windows: an array or a number, not an object that
    changes.
    """
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, (mx.array, str, int, float))


def _joined(parts: list[Any]) -> Any:
    """A block's outputs for all windows: arrays end to end, tuples item by item."""
    if isinstance(parts[0], tuple):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(parts[0])))
    return mx.concatenate(parts) if isinstance(parts[0], mx.array) else parts[0]


@contextmanager
def _recorded(routing: Routing | None) -> Iterator[None]:
    """Record the experts that tokens are sent to, for any family."""
    if routing is None:
        yield
        return

    def record(call: Call) -> Call:
        def replaced(
            self: nn.Module, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any
        ) -> Any:
            chosen = np.sort(np.asarray(indices).astype(np.int32), axis=-1)
            routing.layers.setdefault(id(self), []).append(chosen.reshape(-1, chosen.shape[-1]))
            return call(self, x, indices, *args, **kwargs)

        return replaced

    with wrapped_all({SwitchGLU, SwitchMLP}, record):
        yield
