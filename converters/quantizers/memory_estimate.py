"""How much memory a conversion takes at its peak, from headers alone; measured against real shapes
by eval/bench.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...base.errors import MintError
from ...base.quant_config import KEEP
from ...base.units import both
from ...checkpoint.layers import Inventory, Layer
from ...checkpoint.roles import WRITES
from ...measure.moments import held_moments
from ...runtime.cpu_ops import on_cpu
from ...runtime.memory import fits_here, machine_memory, room

BASE = 500_000_000  # Python, MLX, buffers that are read ahead
FLOAT = 4  # bytes of a number, of weights on a CPU and of what is kept of activations everywhere
LOGITS = (
    6 * FLOAT * 2**25
)  # arrays of logits, side by side while they are differentiated (runner.py cuts them)
# for each weight that is learned: it, its latent code, the best so far, its gradient and moments
LEARNED = 24
# more for each of the layer that takes a step: its new latent code and moments stand beside the old
# ones
MOVED = 18
WINDOWS = 2048  # tokens that go through a block at once


def peak(inventory: Inventory, tokens: int, runs: bool, quantizer: str) -> int:
    """Bytes that a conversion holds at most.

    Args:
        inventory: the model's layers.
        tokens: of the model's own.
        runs: whether the model is run on them.
        quantizer: a name of converters.quantizers.QUANTIZERS.

    Returns:
        Three layers as they are read and written, and, where the model is run: all of it where that
        fits, else its ends and a block, a few arrays of logits, one batch's activations there and
        back; for error feedback what a block's layers read of all tokens, and its own arrays
        instead of the block where they are more; second moments of a block's layers. Learning comes
        after a block's error feedback and takes what `_learned` says, in as few `turns` as memory
        allows, and four hidden states.
    """
    return _peak(
        inventory, tokens, runs, quantizer, turns(inventory, tokens) if quantizer == "learn" else 1
    )


def turns(inventory: Inventory, tokens: int) -> int:
    """In how many turns a block's experts are learned: the fewest of 1, 2, 4, ... with which memory
    suffices here.

    Where it never does, the fewest with which the least is taken.
    """
    most = max((layer.experts for layer in inventory.layers if layer.kind == "experts"), default=1)
    count, taken = 1, _peak(inventory, tokens, True, "learn", 1)
    while 2 * count <= most and taken > room():
        less = _peak(inventory, tokens, True, "learn", 2 * count)
        if less == taken:
            break
        count, taken = 2 * count, less
    return count


def _peak(inventory: Inventory, tokens: int, runs: bool, quantizer: str, turns: int) -> int:
    from .gptq import held

    layers = inventory.layers
    found = BASE + 3 * max((2 * layer.size for layer in layers), default=0)
    if not runs:
        return found
    blocks = [
        [layer for layer in layers if layer.block == index] for index in range(inventory.blocks)
    ]
    largest = max(map(_held, blocks), default=0)
    outer = [layer for layer in layers if layer.role in ("embedding", "head")]
    ends = _held([layer for layer in layers if layer.block is None])
    whole, read = _held(layers), FLOAT * max(map(_read, blocks), default=0)
    arrays = 4 * WINDOWS * read  # with their gradients
    batch = arrays + max((sum(map(held_moments, block)) for block in blocks), default=0)
    rounding = max(map(held, layers), default=0) if quantizer != "rtn" else 0
    rows = tokens * read if quantizer != "rtn" else 0
    if fits_here(whole):
        found, block = found + LOGITS + whole, 0
    else:
        found, block = found + LOGITS + ends, largest
    head = (
        0
        if on_cpu()
        else FLOAT * max((layer.size for layer in outer if layer.reads == 1), default=0)
    )  # in 32 bits
    if quantizer != "learn":  # error feedback reads a block's weights again, when the block is gone
        return found + max(head, rows + max(block + batch, rounding))
    hidden = max((layer.shape[-1] for layer in outer), default=0)
    heads = max(
        (_learned([layer], 1) for layer in layers if layer.role == "head" and learns_head(layer)),
        default=0,
    )
    if not on_cpu():  # a quantized source's layers run as they are until they are learned
        block += FLOAT * max(
            (_weights([layer for layer in one if layer.stored]) for one in blocks), default=0
        )
    arrays *= 3 if on_cpu() else 1  # numpy's exponential has all of them held until a step is done
    learning = block + max(
        [rows + max(batch, rounding), *(arrays + _learned(one, turns) for one in blocks)]
    )
    return found + 4 * FLOAT * tokens * hidden + max(learning, heads, head)  # the head comes last


def _learned(block: list[Layer], turns: int) -> int:
    """What learning takes beside a block's weights.

    Of the experts only a part is learned in a turn; all are held once more, as they are quantized.
    """
    stacks = _weights([layer for layer in block if layer.kind == "experts"]) if turns > 1 else 0
    sizes = [-(-layer.size // turns) if layer.kind == "experts" else layer.size for layer in block]
    return FLOAT * stacks + LEARNED * sum(sizes) + MOVED * max(sizes, default=0)


def _held(layers: Sequence[Layer]) -> int:
    """Bytes of weights as the model is run: float32 on a CPU, else as they are stored."""
    if on_cpu():
        return FLOAT * _weights(layers)
    return sum(layer.bytes(layer.stored or KEEP) for layer in layers)


def _weights(layers: Sequence[Layer]) -> int:
    return sum(layer.size for layer in layers)


def learns_head(head: Layer) -> bool:
    """Whether a head is learned: where that fits in memory."""
    return fits_here(_learned([head], 1))


def check_room(needed: int, advice: str) -> None:
    """Refuse what takes more memory than this machine has.

    Raises:
        MintError: it does; `advice` says what to do.
    """
    if needed > machine_memory():
        raise MintError(
            f"this takes {both(needed)} of memory, and this machine has {both(machine_memory())}: "
            f"{advice}"
        )


def _read(block: list[Layer]) -> int:
    """Numbers that a block's layers read of one token; once what several read (query, key and
    value; gate and up).
    """

    def read(layer: Layer) -> tuple[str, int, int]:
        parent, _, name = layer.path.rpartition(".")
        return (
            layer.path if name in WRITES else parent,
            round(layer.reads * layer.experts),
            layer.shape[-1],
        )

    return sum(copies * columns for _, copies, columns in set(map(read, block)))
