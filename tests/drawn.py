"""Weights that follow from their names: of a tiny checkpoint only names, shapes and types are kept.

`tensors.json` of a folder has a line for each tensor: its name, its type, its shape and the number
near which values lie that are no matrix (a norm's, a bias's).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

TABLE = "tensors.json"
Line = tuple[str, tuple[int, ...], float]  # safetensors type, shape, center


def values(name: str, line: Line) -> np.ndarray:
    """A tensor's float32 values: 129 steps, which are exact in bfloat16."""
    _, shape, center = line
    if "moe_statics" in name:  # mlx-lm drops ERNIE's correction of its router
        return np.zeros(shape, dtype=np.float32)
    # (This generator's numbers are the same in every version of NumPy.)
    random = np.random.RandomState(zlib.crc32(name.encode()))
    steps = np.asarray(random.randint(-64, 65, size=shape)) / 64
    if len(shape) < 2:
        return np.asarray(np.round((center + steps / 8) * 64) / 64, dtype=np.float32)
    # A product of such a matrix has the deviation of what it multiplies.
    scale = 2.0 ** round(np.log2(3.0 / shape[-1]) / 2)
    return np.asarray(steps * scale, dtype=np.float32)


def write_table(folder: Path, table: dict[str, Line]) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(line)}" for name, line in sorted(table.items())]
    (folder / TABLE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_table(folder: Path) -> dict[str, Line]:
    data: dict[str, Any] = json.loads((folder / TABLE).read_text())
    return {name: (kind, tuple(shape), center) for name, (kind, shape, center) in data.items()}
