"""Several machines: each process that `mlx.launch` starts (a rank) does its share of the layers.

Ranks share one folder and send nothing while they work; their results are gathered through MLX's
own communication once all are done. When a rank is lost the others end too, and the same command
resumes from what they finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Environment variables in which a launcher tells a process its rank.
RANK = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


@dataclass(frozen=True)
class Ranks:
    """The processes that work together, and which one this is."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this process does the work that is done only once."""
        return self.rank == 0

    def share(self, sizes: Mapping[str, int]) -> set[str]:
        """The names that this rank works on: largest first, each to the rank with the least so far.

        Args:
            sizes: of all names, in any unit of work.
        """
        loads = [0] * self.size
        names = set()
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            rank = loads.index(min(loads))
            loads[rank] += sizes[name] + 1
            if rank == self.rank:
                names.add(name)
        return names

    def gather(self, data: Any) -> list[Any]:
        """The plain data that each rank gives, in the order of ranks; waits for all ranks."""
        return [json.loads(text) for text in self.gather_bytes(json.dumps(data).encode())]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes that each rank gives, in the order of ranks; waits for all ranks."""
        if self.size == 1:
            return [data]
        import mlx.core as mx
        import numpy as np

        lengths = mx.distributed.all_gather(mx.array([len(data)], dtype=mx.int64), stream=mx.cpu)
        counts = np.asarray(lengths).tolist()

        # all_gather wants arrays of one length, and can't send an empty one.
        padded = np.zeros(max(1, *counts), dtype=np.uint8)
        padded[: len(data)] = np.frombuffer(data, dtype=np.uint8)
        gathered = np.asarray(mx.distributed.all_gather(mx.array(padded), stream=mx.cpu))
        rows = gathered.reshape(self.size, -1)
        return [row[:count].tobytes() for row, count in zip(rows, counts, strict=True)]

    def wait(self) -> None:
        """Wait until all ranks have come to this point."""
        self.gather(None)


ALONE = Ranks(0, 1)


def launched() -> bool:
    """Whether a launcher started this process; imports and connects nothing."""
    return any(os.environ.get(name) for name in RANK)


def launched_rank() -> int:
    """The rank that a launcher gave this process, 0 without one; imports and connects nothing."""
    return next((int(os.environ[name]) for name in RANK if os.environ.get(name, "").isdigit()), 0)


@lru_cache(maxsize=1)
def ranks() -> Ranks:
    """The ranks that this process belongs to; ALONE where no launcher started it."""
    if not launched():
        return ALONE
    import mlx.core as mx

    group = mx.distributed.init()
    return Ranks(group.rank(), group.size()) if group.size() > 1 else ALONE
