"""Groups of weights as columns of an array, and codes in that form packed into 32-bit words.

Sums over a group are sums of rows then, and each operation goes through long rows of memory: numpy
takes a third of the time that it takes for groups as rows. Within a group the even weights come
first, since two neighbours in 16 bits are moved together.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..checkpoint.arrays import flat_view

BLOCK = 2048  # rows that are transposed at once
PACKED_AT_ONCE = 32  # codes of a group, which fill as many words as a code has bits


def raw_rows(weight: mx.array) -> np.ndarray:
    """A weight's memory (rows, columns): bits of bfloat16 as uint16, else float16 or float32."""
    rows = flat_view(weight, np.uint16) if weight.dtype == mx.bfloat16 else np.asarray(weight)
    return rows.reshape(-1, weight.shape[-1])


def as_columns(rows: np.ndarray, group_size: int) -> np.ndarray:
    """Some rows of a weight as float32 (group_size, groups).

    Args:
        rows: from `raw_rows`.
        group_size: an even number that divides the columns.
    """
    half = group_size // 2
    if rows.dtype != np.uint16:
        by_pair = rows.reshape(-1, half, 2)
        columns = np.empty((2, half, len(by_pair)), dtype=np.float32)
        columns[...] = by_pair.transpose(2, 1, 0)
        return columns.reshape(group_size, -1)

    # The bits of bfloat16 are the upper half of those of float32.
    pairs = _transposed(rows.view("<u4").reshape(-1, half))
    columns = np.empty((2, *pairs.shape), dtype=np.uint32)
    np.left_shift(pairs, np.uint32(16), out=columns[0])
    np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=columns[1])
    return columns.reshape(group_size, -1).view(np.float32)


def _transposed(array: np.ndarray) -> np.ndarray:
    """The transpose of an array (rows, columns) in a memory of its own.

    Block by block: numpy goes through all rows for each column, and then no line of them is in the
    processor's cache any more.
    """
    transposed = np.empty(array.shape[::-1], dtype=array.dtype)
    for start in range(0, len(array), BLOCK):
        block = slice(start, start + BLOCK)
        transposed[:, block] = array[block].T
    return transposed


def tiled(values: np.ndarray, rows: int) -> np.ndarray:
    """What stands for each column of a weight as (group_size, groups), for so many rows.

    Args:
        values: float32 (groups of a row, group_size).
        rows: that share them.
    """
    return as_columns(np.tile(values.reshape(-1), (rows, 1)), values.shape[1])


def as_rows(columns: np.ndarray, width: int) -> np.ndarray:
    """What stands in columns (group_size, groups) as rows of so many weights."""
    by_pair = columns.reshape(2, -1, columns.shape[1])
    return np.ascontiguousarray(by_pair.transpose(2, 1, 0)).reshape(-1, width)


def pack_columns(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes that stand in columns, as codes.pack does for rows.

    Args:
        codes: float32 (group_size, groups), whole numbers below 2^bits; those of a group with NaN
            may be anything, and so are its words then.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        uint32 (groups, group_size x bits / 32).
    """
    size, groups = codes.shape
    half = size // 2
    pairs = codes[half:] * np.float32(2**bits)
    pairs += codes[:half]
    pairs = pairs.astype(np.uint32)
    fours = pairs[1::2] << np.uint32(2 * bits)
    fours |= pairs[::2]
    fours = fours.reshape(size // PACKED_AT_ONCE, -1, groups)

    # Four codes fill a part of a word, or of two neighbours.
    words = np.zeros((len(fours), bits, groups), dtype=np.uint32)
    for index in range(fours.shape[1]):
        word, start = divmod(4 * bits * index, 32)
        words[:, word] |= fours[:, index] << np.uint32(start)
        if start + 4 * bits > 32:
            words[:, word + 1] |= fours[:, index] >> np.uint32(32 - start)
    return np.ascontiguousarray(words.reshape(-1, groups).T)


def rounder(dtype: mx.Dtype) -> Callable[[np.ndarray], np.ndarray]:
    """The function that rounds float32 numbers to a type; they stay float32."""
    if dtype == mx.bfloat16:
        return _to_bfloat16
    if dtype == mx.float16:
        return lambda numbers: numbers.astype(np.float16).astype(np.float32)
    return lambda numbers: numbers.astype(np.float32)


def _to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Finite float32 numbers rounded to bfloat16, to even where two are equally near."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
