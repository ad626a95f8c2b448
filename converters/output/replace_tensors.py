"""Replaces tensors in a written checkpoint's shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...base.errors import MintError
from ...base.remove import move
from ...base.safetensors_header import TensorInfo, read_header
from ...checkpoint.arrays import flat_view


def replace_tensors(folder: Path, tensors: Mapping[str, mx.array]) -> None:
    """Write tensors into a checkpoint's shards in place of those of the same names.

    Each shard is copied, changed, and renamed over the old one.

    Raises:
        MintError: a tensor is stored under another name or in another form.
    """
    remaining = dict(tensors)
    for shard in sorted(folder.glob("model*.safetensors")):
        table, start = read_header(shard)
        replaced = {name: remaining.pop(name) for name in table if name in remaining}
        if replaced:
            copy = shard.with_name(f"{shard.name}.part")
            shutil.copyfile(shard, copy)
            _overwrite(copy, table, start, replaced)
            move(copy, shard)
    if remaining:
        raise MintError(
            f"the checkpoint stores {next(iter(remaining))} under another name, so it cannot be "
            "refined: give one that mlx-lm or mint-mlx wrote"
        )


def _overwrite(
    file_path: Path, table: Mapping[str, TensorInfo], start: int, tensors: Mapping[str, mx.array]
) -> None:
    """Overwrite tensors in a shard, and flush it to the disk.

    Args:
        file_path: the shard.
        table: its header.
        start: offset of its data section.
        tensors: by name.

    Raises:
        MintError: a tensor has another size than the one that it replaces.
    """
    with file_path.open("r+b") as file:
        for name, array in tensors.items():
            first, last = table[name].start, table[name].end
            data = flat_view(array, np.uint8).data
            if len(data) != last - first:
                raise MintError(
                    f"{name} takes {last - first} bytes in the checkpoint, but {len(data)} once "
                    "loaded, so it cannot be refined: give one that mlx-lm or mint-mlx wrote"
                )
            file.seek(start + first)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
