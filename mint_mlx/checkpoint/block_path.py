"""Block numbers in module paths and tensor names: reads, replaces and joins them.

The one place that knows how families name the list of their blocks (transformer layers).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"(?P<before>(?:^|\.)(?:layers|h|blocks|block)\.)(?P<number>\d+)(?=\.)")


def block_of(path: str) -> int | None:
    """The index of the block that a module path lies in, or None outside of all blocks."""
    match = _BLOCK.search(path)
    return int(match["number"]) if match else None


def any_block(path: str) -> str:
    """The path with its block number replaced by `*`: equal for the same module of two blocks."""
    return with_block(path, "*")


def with_block(path: str, number: str) -> str:
    """The path with another text in place of its block number."""
    return _BLOCK.sub(lambda match: f"{match['before']}{number}", path, count=1)


def collapse(paths: Sequence[str], blocks: int) -> str:
    """Paths that differ only in their block number as one: `layers.*`, or `layers.[0-2,5]`.

    Args:
        paths: one or more.
        blocks: number of all blocks; `*` stands for so many.
    """
    numbers = sorted(block for block in map(block_of, paths) if block is not None)
    every = len(numbers) == blocks > 1
    return with_block(paths[0], "*" if every else _ranges(numbers))


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: `3`, or `[0-2,5]`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])

    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else f"[{','.join(texts)}]"
