"""Rows of a source that the last verification compares, where its shards are gone by then.

`--low-disk` drops each shard after its last use. What is to be compared is stored in the work
folder before a layer is written, and found there by a run that goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import mlx.core as mx

from ...base.array_files import read_tensors, write_tensors
from ...base.folders import SCRATCH
from .verify_values import Rows


def store_rows(work: Path, rank: int, rows: Iterable[tuple[str, Rows]]) -> None:
    """Add rows to those of a rank.

    Args:
        work: the folder in which the result is made.
        rank: of this process.
        rows: by the layer's path.
    """
    file = _file(work, str(rank))
    tensors = read_tensors(file) if file.is_file() else {}
    added = {f"{path}.{name}": array for path, drawn in rows for name, array in drawn.items()}
    if added:
        write_tensors(file, tensors | added)


def stored_rows(work: Path) -> Iterator[tuple[str, Rows]]:
    """The rows of all ranks, by the layer's path."""
    layers: dict[str, Rows] = {}
    for file in sorted(work.glob(_file(work, "*").name)):
        for name, array in read_tensors(file).items():
            path, _, local = name.rpartition(".")
            layers.setdefault(path, {})[local] = mx.array(array)
    yield from layers.items()


def _file(work: Path, rank: str) -> Path:
    return work / f"{SCRATCH}rows-{rank}.safetensors"
