"""More than one machine: under `mlx.launch` every process (a rank) does its share of the layers.

Ranks share one folder and send nothing while they work; what they found is gathered through MLX's
own engine when all are done. A rank that is lost ends the others, and leaves work that the same
command goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

RANK = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # what launchers tell a process


@dataclass(frozen=True)
class Ranks:
    """The processes that work together, and which one this is."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this one does what is done once."""
        return self.rank == 0

    def share(self, sizes: Mapping[str, int]) -> set[str]:
        """This rank's part of things of different sizes: the largest first, each to the rank with
        the least so far.
        """
        loads, mine = [0] * self.size, set()
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            taker = loads.index(min(loads))
            loads[taker] += sizes[name] + 1
            if taker == self.rank:
                mine.add(name)
        return mine

    def gather(self, data: Any) -> list[Any]:
        """What each rank gives, plain data, in the order of ranks; waits for all."""
        return [json.loads(part) for part in self.gather_bytes(json.dumps(data).encode())]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The same of bytes."""
        if self.size == 1:
            return [data]
        import mlx.core as mx
        import numpy as np

        lengths = mx.distributed.all_gather(mx.array([len(data)], dtype=mx.int64), stream=mx.cpu)
        counts = np.asarray(lengths).tolist()
        padded = np.zeros(max(1, *counts), dtype=np.uint8)  # nothing at all cannot be sent
        padded[: len(data)] = np.frombuffer(data, dtype=np.uint8)
        found = np.asarray(mx.distributed.all_gather(mx.array(padded), stream=mx.cpu)).reshape(
            self.size, -1
        )
        return [row[:count].tobytes() for row, count in zip(found, counts, strict=True)]

    def wait(self) -> None:
        """Go on when all have come here."""
        self.gather(None)


ALONE = Ranks(0, 1)


def launched() -> bool:
    """Whether a launcher started this process; nothing is imported or connected for it."""
    return any(os.environ.get(name) for name in RANK)


def launched_rank() -> int:
    """The rank that a launcher gave this process, 0 without one; nothing is imported or connected
    for it.
    """
    return next((int(os.environ[name]) for name in RANK if os.environ.get(name, "").isdigit()), 0)


@lru_cache(maxsize=1)
def ranks() -> Ranks:
    """The ranks that this process belongs to; ALONE where nothing launched it."""
    if not launched():
        return ALONE
    import mlx.core as mx

    group = mx.distributed.init()
    return Ranks(group.rank(), group.size()) if group.size() > 1 else ALONE
