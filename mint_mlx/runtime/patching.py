"""The one file that patches stock classes and functions while a model runs, always temporarily.

The models are mlx-lm's own; no family's code is copied. To look at a model, to run it block by
block, or to make it fast on a CPU, a method is replaced at the start of a `with` statement and put
back at its end. This is all that is patched, by whom and why:

arguments_of          `__call__` of one module's class, to learn what the module is called with
                      without running what comes after it (runner.trunk_output,
                      blocks.forward_blocks, gradients.to_embedding).
returning             `__call__` of some modules' classes, to leave out what was computed before:
                      the trunk (runner.logits_of), or blocks that have run
                      (blocks.forward_blocks).
returning_once        `__call__` of the blocks' classes, to run only what comes after the blocks
                      (runner.trunk_output_from).
blocks_run_by         `__call__` of the blocks' classes, to read, run and drop them one after the
                      other, for a model larger than memory (blocks.streamed_trunk_output); to
                      leave some out while the others are timed (time_model.time_rest).
layers_run_by         `__call__` of some layers' classes, to quantize each when it is first called
                      (converters/quantizers/drift_model.py).
experts_run_by        `__call__` of some expert layers' classes, to learn a few of their experts at
                      a time (converters/quantizers/learn_turns.py).
experts_computed_by   `__call__` of SwitchGLU, to run a group of experts whole in numpy, on a CPU
                      (cpu_ops.whole_experts).
routing_seen          `__call__` of SwitchGLU and SwitchMLP, to record which experts each token
                      takes (forward.py, taps.watched).
outputs_changed       `__call__` of the layers' classes, and `as_linear` of Embedding and
                      QuantizedEmbedding (a tied head), to record what layers read and to add the
                      taps of a backward pass (taps.watched).
embeddings_changed    `__call__` of Embedding and QuantizedEmbedding, to add a tap to the
                      embedding's output (gradients.to_embedding).
quantized_products    `mx.quantized_matmul` and `mx.gather_qmm`, which are slow on a CPU
                      (cpu_ops.dense_products).
attention_and_swiglu  `mx.fast.scaled_dot_product_attention`, and `swiglu` in the Python modules of
                      a model's classes, whose exponentials are slow on a CPU (fast_math.py).
attention_computed_by `mx.fast.scaled_dot_product_attention`, for one token at a time, which is slow
                      on a CPU (fast_math.decoding_attention).

Loading is patched in checkpoint/straight.py: `straight_parameters` replaces `mx.load`, `mx.stack`
and the indexing of arrays to learn which tensors of the files a parameter is made of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu as stock_swiglu
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

Call = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class NotCalled(Exception):
    """A module is never called."""


class _Called(Exception):
    """Carries a module's arguments out of the run that calls it."""

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        self.module = module
        self.arguments = arguments


def arguments_of(module: nn.Module, run: Callable[[], Any]) -> Arguments:
    """What a module is first called with while `run()` runs, which ends there.

    Raises:
        NotCalled: `run()` doesn't call it.
    """

    def stop(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise _Called(module, (args, kwargs))

    with _calls_replaced([module], stop):
        try:
            run()
        except _Called as called:
            if called.module is not module:
                raise
            return called.arguments
    raise NotCalled


def returning(modules: Collection[nn.Module], value: Any) -> AbstractContextManager[None]:
    """Let these modules return a known value instead of running."""
    return _calls_replaced(modules, lambda *args, **kwargs: value)


def returning_once(blocks: Collection[nn.Module], value: Any) -> AbstractContextManager[None]:
    """As `returning`, for modules that must not be called twice (a ValueError)."""
    waiting = {id(block) for block in blocks}

    def once(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if id(block) not in waiting:
            raise ValueError("a block is called more than once")
        waiting.remove(id(block))
        return value

    return _calls_replaced(blocks, once)


def blocks_run_by(blocks: Collection[nn.Module], run: Call) -> AbstractContextManager[None]:
    """Let a call of a block be `run(block, *args, **kwargs)`; in there the block runs itself."""
    return _calls_replaced(blocks, run)


def layers_run_by(layers: Collection[nn.Module], run: Call) -> AbstractContextManager[None]:
    """Let a call of a layer be `run(layer, x, ...)`, as `blocks_run_by`."""
    return _calls_replaced(layers, run)


def experts_run_by(layers: Collection[nn.Module], run: Call) -> AbstractContextManager[None]:
    """Let a call of an expert layer be `run(layer, x, indices, ...)`, as `blocks_run_by`."""
    return _calls_replaced(layers, run)


def experts_computed_by(make: Callable[[Call], Call]) -> AbstractContextManager[None]:
    """Let a group of experts be what `make` gives for the stock method."""
    return _patched([(SwitchGLU, "__call__", make)])


def routing_seen(
    see: Callable[[nn.Module, mx.array], None],
) -> AbstractContextManager[None]:
    """Call `see(module, indices)` before each group of routed experts; indices are (..., k)."""

    def seen(stock: Call) -> Call:
        def call(self: nn.Module, x: mx.array, indices: mx.array, *args: Any, **kw: Any) -> Any:
            see(self, indices)
            return stock(self, x, indices, *args, **kw)

        return call

    return _patched([(kind, "__call__", seen) for kind in (SwitchGLU, SwitchMLP)])


def outputs_changed(kinds: Iterable[type], change: Call) -> AbstractContextManager[None]:
    """Let layers of these classes, and tied heads, return `change(layer, out, x, *args, **kwargs)`.

    `out` is what the stock layer returns for x and the other arguments.
    """
    layers = [(kind, "__call__", _changed(change)) for kind in kinds]
    tied_heads = [(kind, "as_linear", _changed(change)) for kind in EMBEDDINGS]
    return _patched(layers + tied_heads)


def embeddings_changed(change: Call) -> AbstractContextManager[None]:
    """Let embeddings return `change(embedding, out, ids)`, `out` being what they return stock."""
    return _patched([(kind, "__call__", _changed(change)) for kind in EMBEDDINGS])


def quantized_products(matmul: Call, gather: Call) -> AbstractContextManager[None]:
    """Let `mx.quantized_matmul` and `mx.gather_qmm` be these functions."""
    return _patched(
        [(mx, "quantized_matmul", lambda _: matmul), (mx, "gather_qmm", lambda _: gather)]
    )


def attention_and_swiglu(
    model: nn.Module, attention: Callable[[Call], Call], swiglu: Call
) -> AbstractContextManager[None]:
    """Let a model use these in place of MLX's attention and mlx-lm's SwiGLU.

    Args:
        model: whose classes' Python modules are searched for mlx-lm's `swiglu`.
        attention: makes the replacement from `mx.fast.scaled_dot_product_attention`.
        swiglu: the replacement.
    """
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    users = [module for module in modules if getattr(module, "swiglu", None) is stock_swiglu]
    return _patched(
        [
            (mx.fast, "scaled_dot_product_attention", attention),
            *((module, "swiglu", lambda _: swiglu) for module in users),
        ]
    )


def attention_computed_by(make: Callable[[Call], Call]) -> AbstractContextManager[None]:
    """Let `mx.fast.scaled_dot_product_attention` be what `make` gives for the function there."""
    return _patched([(mx.fast, "scaled_dot_product_attention", make)])


def _changed(change: Call) -> Callable[[Call], Call]:
    """Makes of a stock method one whose output goes through `change`."""

    def changed(stock: Call) -> Call:
        def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            return change(self, stock(self, x, *args, **kwargs), x, *args, **kwargs)

        return call

    return changed


def _calls_replaced(
    modules: Collection[nn.Module], replacement: Call
) -> AbstractContextManager[None]:
    """Let a call of one of these modules be `replacement(module, *args, **kwargs)`.

    Inside the replacement the module is the stock one again. Other modules of the same classes stay
    as they are.
    """
    replaced = {id(module) for module in modules}

    def dispatching(stock: Call) -> Call:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in replaced:
                return stock(self, *args, **kwargs)
            replaced.remove(id(self))
            try:
                return replacement(self, *args, **kwargs)
            finally:
                replaced.add(id(self))

        return call

    return _patched([(kind, "__call__", dispatching) for kind in {type(m) for m in modules}])


@contextmanager
def _patched(patches: Collection[tuple[Any, str, Callable[[Call], Call]]]) -> Iterator[None]:
    """Replace attributes of classes or Python modules, and put them back at the end.

    Args:
        patches: (class or module, attribute, makes the replacement from the stock attribute).
    """
    # Looked up before any is replaced: of two classes one may inherit the other's method.
    stock = [getattr(owner, name) for owner, name, _ in patches]
    inherited = [name not in vars(owner) for owner, name, _ in patches]
    try:
        for (owner, name, make), original in zip(patches, stock, strict=True):
            setattr(owner, name, make(original))
        yield
    finally:
        for (owner, name, _), original, foreign in zip(patches, stock, inherited, strict=True):
            if foreign:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
