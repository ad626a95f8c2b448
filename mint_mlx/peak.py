"""How much memory a conversion takes at its peak, from headers alone; measured against real shapes by eval/bench."""

from __future__ import annotations

from .errors import MintError
from .layers import Inventory, Layer
from .ldl import held_moments
from .memory import fits_here, machine_memory
from .units import both

BASE = 500_000_000  # Python, MLX, buffers that are read ahead
FLOAT = 4  # bytes of a number while the model runs
LOGITS = (
    6 * FLOAT * 2**25
)  # arrays of logits that stand side by side while they are differentiated (runner.py cuts them)
LEARNED = 28  # for each weight that is learned: itself, its latent code, gradients and their moments
WINDOWS = 2048  # tokens that go through a block at once


def peak(inventory: Inventory, tokens: int, runs: bool, quantizer: str) -> int:
    """Bytes that a conversion holds at most.

    Args:
        inventory: the model's layers.
        tokens: of the model's own.
        runs: whether the model is run on them.
        quantizer: a name of converters.quantizers.QUANTIZERS.

    Returns:
        Three layers as they are read and written, and, where the model is run: all of it where that fits, else its ends
        and a block, a few arrays of logits, one batch's activations there and back; for error feedback what a block's
        layers read of all tokens, and its own arrays instead of the block where they are more; second moments of a
        block's layers. Learning takes LEARNED bytes for each weight of a block, or of a head that is learned, and four
        hidden states.
    """
    from .converters.gptq import held

    layers = inventory.layers
    found = BASE + 3 * max((2 * layer.size for layer in layers), default=0)
    if not runs:
        return found
    blocks = [[layer for layer in layers if layer.block == index] for index in range(inventory.blocks)]
    largest = max((sum(layer.size for layer in block) for block in blocks), default=0)
    ends = sum(layer.size for layer in layers if layer.block is None)
    whole, read = FLOAT * sum(layer.size for layer in layers), FLOAT * max(map(_read, blocks), default=0)
    batch, rounding = 2 * WINDOWS * read + max((sum(map(held_moments, block)) for block in blocks), default=0), 0
    if quantizer != "rtn":
        rounding = max(map(held, layers), default=0)
        found += tokens * read
    if fits_here(whole):
        found += LOGITS + whole + max(batch, rounding)
    else:
        found += LOGITS + FLOAT * ends + max(FLOAT * largest + batch, rounding)
    if quantizer == "learn":
        hidden = max((layer.shape[-1] for layer in layers if layer.role in ("embedding", "head")), default=0)
        heads = [layer.size for layer in layers if layer.role == "head" and learns_head(layer)]
        found += LEARNED * max([largest, *heads]) + 4 * FLOAT * tokens * hidden
    return found


def learns_head(head: Layer) -> bool:
    """Whether a head is learned: where that fits in memory."""
    return fits_here(LEARNED * head.size)


def check_room(needed: int, advice: str) -> None:
    """Refuse what takes more memory than this machine has.

    Raises:
        MintError: it does; `advice` says what to do.
    """
    if needed > machine_memory():
        raise MintError(f"this takes {both(needed)} of memory, and this machine has {both(machine_memory())}: {advice}")


def _read(block: list[Layer]) -> int:
    """Numbers that a block's layers read of one token; once what several read (query, key and value; gate and up)."""
    return sum(copies * columns for copies, columns in {(round(x.reads * x.experts), x.shape[-1]) for x in block})
