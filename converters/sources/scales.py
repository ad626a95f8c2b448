"""Scales of a weight's codes: what shares one, by their shape, and their product with the codes.

They belong to the tensor, to each expert, to each row, to groups of columns in a row or to blocks
of rows and columns; every tool writes them with axes of its own.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .stated import Stated

Block = tuple[int, int]  # rows and columns that share a scale; 0 for all of them
TENSOR: Block = (0, 0)
ROW: Block = (1, 0)
COLUMN: Block = (0, 1)  # of FBGEMM alone, whose fused experts are (experts, inputs, outputs)


def find_block(
    weight: tuple[int, ...], scales: tuple[int, ...], stated: Stated, default: Block | None = None
) -> Block | None:
    """What shares a scale, by the shapes of a weight and of its scales; None where nothing fits.

    Args:
        weight: the weight's shape, experts first where it has them.
        scales: the shape of its scales.
        stated: says which blocks there may be.
        default: the block where config.json names none.
    """
    blocks = stated_blocks(stated) or ([default] if default else [])
    whole = [TENSOR, ROW, *([COLUMN] if stated.method == "fbgemm_fp8" else [])]

    # Where blocks are stated, a table of scales is one of blocks.
    if stated.table.get("weight_block_size") and len(scales) >= 2:
        whole = []
    large = [block for block in blocks if block[0] > 1]
    candidates = [*large, *whole, *(block for block in blocks if block not in large)]
    return next((block for block in candidates if scales in _shapes(weight, block)), None)


def stated_blocks(stated: Stated) -> list[Block]:
    """The blocks that config.json names."""
    sizes = [stated.table.get("weight_block_size")]
    for scheme in stated.schemes:
        size = scheme.get("group_size")
        sizes += [scheme.get("block_structure"), [1, size] if size else None]
    return [block for block in map(as_block, sizes) if block is not None]


def as_block(size: Any) -> Block | None:
    """Rows and columns from a value of config.json; None where it isn't two numbers of them."""
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return None
    return (size[0], size[1]) if all(type(n) is int and n > 0 for n in size) else None


def _counts(rows: int, columns: int, block: Block) -> tuple[int, int]:
    """How many blocks there are along rows and columns; the last ones may be cut off."""
    high = -(-rows // block[0]) if block[0] else 1
    wide = -(-columns // block[1]) if block[1] else 1
    return high, wide


def _shapes(weight: tuple[int, ...], block: Block) -> list[tuple[int, ...]]:
    """The shapes that scales of such blocks may have."""
    if len(weight) < 2:
        return []
    *lead, rows, columns = weight
    high, wide = _counts(rows, columns, block)

    # ModelOpt leaves an axis for each block's own rows and columns.
    shapes: list[tuple[int, ...]] = [(*lead, high, wide), (*lead, high, 1, wide, 1)]
    if not block[1]:
        shapes.append((*lead, high))
    if block == TENSOR:
        shapes += [tuple(lead), (), (1,), (1,) * len(weight)]
    return shapes


def in_words(block: Block) -> str:
    """What shares a scale, in words."""
    if block == TENSOR:
        return "with one scale a tensor"
    if block == ROW:
        return "with one scale a row"
    if block == COLUMN:
        return "with one scale a column"
    if block[0] == 1:
        return f"in groups of {block[1]}"
    return f"in blocks of {block[0]}x{block[1]}"


def widen(numbers: mx.array, shape: tuple[int, ...], block: Block) -> mx.array:
    """Scales or zero points in float32, so that they broadcast over a weight.

    Args:
        numbers: of any shape that `find_block` takes.
        shape: of the weight, (..., rows, columns).
        block: from `find_block`.
    """
    numbers = numbers.astype(mx.float32)
    if numbers.size == 1:
        return numbers.reshape(())
    *lead, rows, columns = shape
    numbers = numbers.reshape(*lead, *_counts(rows, columns, block))

    # The last blocks may be cut off.
    if block[0] > 1:
        numbers = mx.repeat(numbers, block[0], axis=-2)[..., :rows, :]
    if block[1] > 1:
        numbers = mx.repeat(numbers, block[1], axis=-1)[..., :columns]
    return numbers
