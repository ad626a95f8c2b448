"""Stored weights by the direct formulas of their formats."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import safe_open

from mint_mlx.checkpoint.arrays import dense
from mint_mlx.checkpoint.layer_stream import stream
from mint_mlx.jobs.model import prepare

E2M1 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)


def bf16(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16 (nearest, ties to even)."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """The values of E4M3 codes, from sign, exponent (bias 7) and mantissa."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> 3) & 15
    mantissa = codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7)
    subnormal = mantissa / 8 * 2.0**-6
    return (sign * np.where(exponent == 0, subnormal, normal)).astype(np.float32)


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def raw(folder: Path, name: str) -> np.ndarray:
    """A source's tensor: its bytes where numpy lacks the type, float32 for bfloat16."""
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "numpy") as shard:
            if name in shard.keys():  # noqa: SIM118 (it is no mapping)
                try:
                    return np.asarray(shard.get_tensor(name))
                except (TypeError, AttributeError):  # float8 and bfloat16
                    array = mx.load(str(file))[name]  # type: ignore[index, call-overload]
                    return np.array(array) if array.dtype == mx.uint8 else as_numpy(array)
    raise KeyError(name)


def weight(folder: Path, path: str) -> np.ndarray:
    """A layer's unquantized weight as profile and convert see it."""
    job = prepare(str(folder))
    layer = next(layer for layer in job.inventory.layers if layer.path == path)
    ((_, tensors),) = stream(job.source, job.inventory, [path])
    return as_numpy(dense(layer, tensors))
