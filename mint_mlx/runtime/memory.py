"""Which size of a model a machine can run: its memory less a reserve, the cache and a workspace.

macOS lets the GPU wire about two thirds of the memory of a Mac with up to 32 GiB and three quarters
of larger ones (`max_recommended_working_set_size`); the rest is left to the system and to other
programs.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.hf_config import text_config
from ..base.units import UNITS, both
from ..checkpoint.layers import Inventory
from ..checkpoint.roles import EXPERTS
from .kvcache import PREFILL, CacheSize, cache_size
from .machine import CONTEXT, Machine, check_context

GIB = UNITS["GiB"]
MAC_SIZES = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GiB, as sold
RESERVE = GIB  # buffers that MLX keeps, Python, the tokenizer
SYSTEM = 8 * GIB  # what a raised limit leaves to macOS
# Sizes of a head for which MLX's Metal kernels read a prompt without writing the scores out.
FUSED = (64, 80, 128)
# Linux's limits, both kinds.
CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Needs:
    """What running a model takes beside its weights.

    Attributes:
        context: tokens.
        kv_bits: bits of the cache; None where it isn't quantized.
        cache: bytes of the key-value cache.
        workspace: bytes of activations and scores while a prompt is read.
    """

    context: int
    kv_bits: int | None
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """Bytes of all of it, the reserve included."""
        return RESERVE + self.cache + self.workspace


@dataclass(frozen=True)
class Fit:
    """How much memory a machine has for a model's weights.

    Attributes:
        memory: bytes of the machine.
        limit: bytes that its GPU may use.
        measured: whether the driver says so (else it is macOS's default for such a size).
        needs: what the weights can't have.
    """

    memory: int
    limit: int
    measured: bool
    needs: Needs

    @property
    def budget(self) -> int:
        """Bytes that the weights can have."""
        return self.limit - self.needs.total

    @property
    def raised(self) -> int:
        """The limit that `iogpu.wired_limit_mb` could set."""
        return max(self.limit, self.memory - max(SYSTEM, self.memory // 8))


def gpu_limit(memory: int) -> int:
    """Bytes that macOS lets the GPU use by default on a Mac of so many bytes."""
    return memory * 2 // 3 if memory <= 32 * GIB else memory * 3 // 4


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container that this runs in."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in CONTAINER:
        with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
            memory = min(memory, int(Path(file).read_text()))
    return memory


def machine_limit() -> tuple[int, bool]:
    """Bytes that a model may use on this machine, and whether a Mac's driver says so."""
    import mlx.core as mx  # not at the top: refusals that need no limit don't load mlx

    working_set = None
    if mx.metal.is_available():
        working_set = mx.device_info().get("max_recommended_working_set_size")
    if working_set:
        return int(working_set), True
    return gpu_limit(machine_memory()), False


def room() -> int:
    """Bytes that a conversion may hold on this machine.

    What the GPU may use where a driver says so, else all memory.
    """
    limit, measured = machine_limit()
    return limit if measured else machine_memory()


def needs(
    config: dict[str, Any], inventory: Inventory, context: int = CONTEXT, kv_bits: int | None = None
) -> Needs:
    """What running a model with a context of so many tokens takes beside its weights.

    Raises:
        UsageError: there is no such context, or no cache of so many bits.
    """
    check_context(context, kv_bits)
    cache = cache_size(config, context, kv_bits)
    tokens = min(context, PREFILL)
    return Needs(
        context,
        kv_bits,
        cache.bytes,
        workspace(inventory, tokens) + scores(config, inventory, cache, kv_bits),
    )


def scores(
    config: dict[str, Any], inventory: Inventory, cache: CacheSize, kv_bits: int | None
) -> int:
    """Bytes of attention scores while a prompt is read, where MLX's attention writes them out.

    That is so for MLA, for a quantized cache, and for heads of another size than FUSED: the scores
    of one block and their softmax then stand side by side, 16 bits each.
    """
    fused = (
        kv_bits is None
        and cache.size in FUSED
        and not any(layer.role == "mla" for layer in inventory.layers)
    )
    heads = text_config(config).get("num_attention_heads")
    if fused or not cache.tokens or type(heads) is not int:
        return 0
    return 2 * 2 * heads * min(cache.tokens, PREFILL) * cache.tokens


def workspace(inventory: Inventory, tokens: int) -> int:
    """Bytes of activations while so many tokens are put through at once.

    They are the outputs of the largest block's layers. Each routed expert layer has k outputs a
    token, and its tokens are gathered k times; two more copies of the largest output stand for
    norms, products and the residual stream. All in 16 bits; logits are computed for one token only.
    """
    blocks: dict[int, int] = {}
    widest = 0
    for layer in inventory.layers:
        if layer.block is None:
            continue
        copies = round(layer.reads * layer.shape[0]) if layer.role in EXPERTS else 1
        rows = layer.shape[0] if layer.kind == "multi-linear" else copies
        blocks[layer.block] = blocks.get(layer.block, 0) + rows * layer.shape[-2]
        if layer.role in EXPERTS:  # tokens are gathered once for gate, up and down
            blocks[layer.block] += copies * layer.shape[-1] // 3
        widest = max(widest, rows * layer.shape[-2])
    return 2 * tokens * (max(blocks.values(), default=0) + 2 * widest)


def fit(machine: Machine, needs: Needs) -> Fit:
    """How much memory a machine has for a model's weights.

    Raises:
        MintError: nothing is left for a model.
    """
    if machine.memory is None:
        limit, measured = machine_limit()
        room = Fit(machine_memory(), limit, measured, needs)
    else:
        room = Fit(machine.memory, gpu_limit(machine.memory), False, needs)

    # Weights of no bytes are no model.
    if room.budget <= 0:
        raise MintError(
            f"nothing is left for the weights: of {both(room.memory)} the GPU may use "
            f"{both(room.limit)}, and a context of {needs.context} tokens needs "
            f"{both(needs.total)}: give a shorter --context"
        )
    return room


def smallest_mac(model_bytes: int, needs: Needs | None) -> int | None:
    """The memory in GiB of the smallest Mac that runs a model of so many bytes.

    None where there is none, or where the model's needs are unknown.
    """
    if needs is None:
        return None
    total = model_bytes + needs.total
    return next((size for size in MAC_SIZES if gpu_limit(size * GIB) >= total), None)


def largest_model() -> int:
    """Bytes of the largest model that can be run on this machine for a short text."""
    limit, measured = machine_limit()
    return (limit if measured else int(machine_memory() * 0.7)) - RESERVE


def fits_here(model_bytes: int) -> bool:
    """Whether a model of so many bytes can be run on this machine for a short text."""
    return model_bytes <= largest_model()
