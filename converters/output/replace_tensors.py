"""Put other tensors into a written checkpoint's shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ...base.errors import MintError
from ...base.safetensors_header import read_header
from ...checkpoint.arrays import flat_view


def replace_tensors(folder: Path, tensors: Mapping[str, mx.array]) -> None:
    """Write the refined tensors into a checkpoint's shards: each is copied, changed, and put in the
    old one's place.

    Raises:
        MintError: a tensor is stored under another name or in another form.
    """
    left = dict(tensors)
    for shard in sorted(folder.glob("model*.safetensors")):
        table, start = read_header(shard)
        here = {name: left.pop(name) for name in table if name in left}
        if not here:
            continue
        copy = shard.with_name(f"{shard.name}.part")
        shutil.copyfile(shard, copy)
        with copy.open("r+b") as file:
            for name, array in here.items():
                first, last = table[name].start, table[name].end
                data = flat_view(array, mx.uint8).data
                if len(data) != last - first:
                    raise MintError(
                        f"{name} takes {last - first} bytes in {shard.name}, {len(data)} once "
                        "loaded"
                    )
                file.seek(start + first)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        copy.replace(shard)
    if left:
        raise MintError(
            f"the checkpoint stores {next(iter(left))} under another name: it can't be refined"
        )
