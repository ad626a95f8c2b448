"""How much memory a conversion holds at its peak, from headers alone.

Each function is the `memory` of quantizers' entries (registry.py): `rounding` where codes follow
from weights, `feedback` with error feedback, `learning` where blocks are learned after it. Measured
against real shapes by eval/bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...base.errors import MintError
from ...base.quant_config import KEEP
from ...base.units import both
from ...checkpoint.layers import Inventory, Layer
from ...checkpoint.roles import WRITES
from ...measure.moments import held_moments
from ...runtime.device import on_cpu
from ...runtime.memory import fits_here, machine_memory, room
from . import gptq

BASE = 500_000_000  # Python, MLX, buffers that are read ahead
FLOAT = 4  # bytes of a number, of weights on a CPU and of stored activations everywhere
# Arrays of logits, side by side while they are differentiated (runner.py cuts them).
LOGITS = 6 * FLOAT * 2**25
# For each learned weight: it, its latent code, the best so far, its gradient and moments.
LEARNED = 24
# More for each weight of the layer that takes a step: its new latent code and moments stand beside
# the old ones.
MOVED = 18
WINDOWS = 2048  # tokens that go through a block at once


@dataclass(frozen=True)
class _Walk:
    """What a walk through the model's blocks holds, in bytes.

    Attributes:
        always: the program, three layers as they are read and written, the logits, and all of the
            model where that fits, else its ends.
        block: a block's weights, where they are not held already.
        activations: one batch's, with their gradients.
        moments: second moments of a block's layers.
        rows: what a block's layers read of one token.
        head: the head in 32 bits.
    """

    always: int
    block: int
    activations: int
    moments: int
    rows: int
    head: int

    @property
    def batch(self) -> int:
        """One batch on its way through a block."""
        return self.activations + self.moments


def rounding(inventory: Inventory, tokens: int, runs: bool) -> int:
    """Bytes that a conversion holds at most where codes follow from weights.

    Args:
        inventory: the model's layers.
        tokens: of the model's own.
        runs: whether the model is run on them, for its sensitivity.

    Returns:
        Three layers as they are read and written, and, where the model is run: all of it where that
        fits, else its ends and a block, a few arrays of logits, one batch's activations there and
        back, second moments of a block's layers.
    """
    if not runs:
        return _three_layers(inventory)
    walk = _walk(inventory)
    return walk.always + max(walk.head, walk.block + walk.batch)


def feedback(inventory: Inventory, tokens: int, runs: bool) -> int:
    """As `rounding`, with error feedback.

    Returns:
        More by what a block's layers read of all tokens, and error feedback's own arrays instead of
        the block where they are more: a block's weights are read again when the block is gone.
    """
    if not runs:
        return _three_layers(inventory)
    walk = _walk(inventory)
    beside = max(walk.block + walk.batch, _feedback_arrays(inventory))
    return walk.always + max(walk.head, tokens * walk.rows + beside)


def following(inventory: Inventory, tokens: int, runs: bool) -> int:
    """As `feedback`, by what layers read behind quantized layers as well.

    Returns:
        More by the same twice more (what one run on all windows holds, and what a layer reads), by
        two hidden states, by the block, which stays, and by its largest layer as it was and as its
        codes mean it.
    """
    if not runs:
        return _three_layers(inventory)
    walk = _walk(inventory)
    layer = max((layer.size for layer in inventory.layers if layer.block is not None), default=0)
    beside = walk.block + 2 * FLOAT * layer + max(walk.batch, _feedback_arrays(inventory))
    hidden = 2 * FLOAT * tokens * _hidden_size(inventory)
    return walk.always + hidden + max(walk.head, 3 * tokens * walk.rows + beside)


def learning(inventory: Inventory, tokens: int, runs: bool) -> int:
    """As `feedback`, with learning after a block's error feedback.

    Returns:
        More by what `_learned` says, in as few `turns` as memory allows, and by four hidden states.
    """
    return (
        _learning(inventory, tokens, turns(inventory, tokens)) if runs else _three_layers(inventory)
    )


def turns(inventory: Inventory, tokens: int) -> int:
    """In how many turns a block's experts are learned: the fewest that fit in memory.

    That is of 1, 2, 4, ...; where none fits, the fewest of those that take the least.
    """
    most = max((layer.experts for layer in inventory.layers if layer.kind == "experts"), default=1)
    count = 1
    needed = _learning(inventory, tokens, count)
    while 2 * count <= most and needed > room():
        less = _learning(inventory, tokens, 2 * count)
        if less == needed:
            break
        count *= 2
        needed = less
    return count


def _learning(inventory: Inventory, tokens: int, turns: int) -> int:
    """Bytes that learning holds at most in so many turns."""
    walk, blocks = _walk(inventory), _blocks(inventory)

    # On a GPU a quantized source's layers run as they are until they are learned.
    block = walk.block
    if not on_cpu():
        stored = [[layer for layer in layers if layer.stored] for layers in blocks]
        block += FLOAT * max(map(_weights, stored), default=0)

    # On a CPU numpy's exponential has all activations held until a step is done.
    activations = walk.activations * (3 if on_cpu() else 1)
    starting = tokens * walk.rows + max(walk.batch, _feedback_arrays(inventory))
    steps = [activations + _learned(layers, turns) for layers in blocks]
    in_blocks = block + max([starting, *steps])

    # The head comes last, when no block is held.
    heads = [layer for layer in inventory.layers if layer.role == "head" and learns_head(layer)]
    head = max((_learned([layer], 1) for layer in heads), default=0)
    hidden = 4 * FLOAT * tokens * _hidden_size(inventory)
    return walk.always + hidden + max(in_blocks, head, walk.head)


def _three_layers(inventory: Inventory) -> int:
    """The program, and three layers as they are read and written."""
    return BASE + 3 * max((2 * layer.size for layer in inventory.layers), default=0)


def _walk(inventory: Inventory) -> _Walk:
    """What a walk through a model's blocks holds."""
    layers, blocks = inventory.layers, _blocks(inventory)
    always = _three_layers(inventory) + LOGITS

    # The whole model is held where it fits, else its ends and a block at a time.
    block = 0
    whole = _held(layers)
    if fits_here(whole):
        always += whole
    else:
        always += _held([layer for layer in layers if layer.block is None])
        block = max(map(_held, blocks), default=0)

    rows = FLOAT * max(map(_read, blocks), default=0)
    head = 0
    if not on_cpu():
        tied = (layer.size for layer in _outer(inventory) if layer.reads == 1)
        head = FLOAT * max(tied, default=0)
    moments = max((sum(map(held_moments, layers)) for layers in blocks), default=0)
    return _Walk(always, block, 4 * WINDOWS * rows, moments, rows, head)


def _blocks(inventory: Inventory) -> list[list[Layer]]:
    """The layers of each block."""
    return [
        [layer for layer in inventory.layers if layer.block == index]
        for index in range(inventory.blocks)
    ]


def _outer(inventory: Inventory) -> list[Layer]:
    """Embedding and head."""
    return [layer for layer in inventory.layers if layer.role in ("embedding", "head")]


def _hidden_size(inventory: Inventory) -> int:
    """Columns of embedding and head."""
    return max((layer.shape[-1] for layer in _outer(inventory)), default=0)


def _feedback_arrays(inventory: Inventory) -> int:
    """What error feedback takes while it rounds a layer."""
    return max(map(gptq.held, inventory.layers), default=0)


def _learned(block: Sequence[Layer], turns: int) -> int:
    """What learning takes beside a block's weights.

    A turn learns a share of the experts; all are held once more, as they are quantized.
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


def has_room(needed: int) -> bool:
    """Whether this machine has so much memory in all."""
    return needed <= machine_memory()


def check_room(needed: int, advice: str) -> None:
    """Refuse work that needs more memory than this machine has.

    Raises:
        MintError: it does; `advice` says what to do.
    """
    if not has_room(needed):
        raise MintError(
            f"this takes {both(needed)} of memory, and this machine has {both(machine_memory())}: "
            f"{advice}"
        )


def _read(block: Sequence[Layer]) -> int:
    """Numbers that a block's layers read of one token.

    Layers that read the same (query, key and value; gate and up) count once.
    """

    def read(layer: Layer) -> tuple[str, int, int]:
        parent, _, name = layer.path.rpartition(".")
        reader = layer.path if name in WRITES else parent
        return reader, round(layer.reads * layer.experts), layer.shape[-1]

    return sum(copies * columns for _, copies, columns in set(map(read, block)))
