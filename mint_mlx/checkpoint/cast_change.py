"""What writing a source in another 16-bit type does to its weights, and whether they fit.

A 16-bit tensor has 65,536 possible numbers: how often each occurs tells its error exactly, in one
pass over the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..base.errors import TOO_LARGE, MintError
from ..base.hf_config import HALVES
from ..base.report import Progress
from ..base.safetensors_header import TensorInfo, read_header
from ..converters.sources.layouts import describe
from .layers import MLX_DTYPES, Inventory
from .roles import TOWER
from .source import Source

CHUNK = 1 << 24  # bytes read at once


@dataclass(frozen=True)
class CastChange:
    """The largest change that a cast makes.

    Attributes:
        name: of the tensor in the source.
        relative: the norm of its change over its norm.
        zeros: how many numbers of all tensors become zeros that were none.
    """

    name: str
    relative: float
    zeros: int


def cast_change(
    source: Source, inventory: Inventory, code: str, progress: Progress
) -> CastChange | None:
    """How much a cast changes the weights; None where none is of another type.

    Those of foreign formats are dequantized in the new type, and so aren't cast.

    Args:
        source: whose weights are on this machine.
        inventory: its layers; what it writes in float32 isn't cast.
        code: `F16` or `BF16`.
        progress: is called before each tensor.

    Raises:
        MintError: naming the tensor that float16 cannot hold.
    """
    if describe(source.config, source.path, source.headers, source.keep_nvfp4):
        return None
    places = list(_tensors_to_cast(source, inventory, code))
    largest, name, zeros = -1.0, "", 0
    for number, (file, tensor, info) in enumerate(places):
        progress(tensor, number, len(places))
        relative, lost = _change(tensor, _counted(file, info), code)
        zeros += lost
        if relative > largest:
            largest, name = relative, tensor
    return CastChange(name, largest, zeros) if places else None


def _tensors_to_cast(
    source: Source, inventory: Inventory, code: str
) -> Iterator[tuple[Path, str, TensorInfo]]:
    """File, name and place of each tensor of floats that is written in another type."""
    floats = {*HALVES.values(), "F32"} - {code}
    owners = set(inventory.order)
    single = {
        _local(spec.name)
        for specs in inventory.others.values()
        for spec in specs
        if spec.dtype == "F32"
    }
    for file, table in source.headers.items():
        for name, info in table.items():
            tower = not inventory.towers and _is_tower(name, owners)
            if info.dtype in floats and _local(name) not in single and not tower:
                yield source.path / file, name, info


def _local(name: str) -> str:
    """The last two words of a tensor's name."""
    return ".".join(name.split(".")[-2:])


def _is_tower(name: str, owners: set[str]) -> bool:
    """Whether a tensor is a tower's that isn't written."""
    return bool(TOWER.search(name)) and name.rpartition(".")[0] not in owners


def _counted(file: Path, info: TensorInfo) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A tensor's numbers, float32, each with how often it occurs, int64."""
    bits = np.uint32 if info.dtype == "F32" else np.uint16
    counts = np.zeros(1 << 16, dtype=np.int64)
    data = read_header(file)[1]
    for start in range(info.start, info.end, CHUNK):
        size = min(CHUNK, info.end - start) // np.dtype(bits).itemsize
        values = np.fromfile(file, dtype=bits, count=size, offset=data + start)
        if info.dtype == "F32":
            yield values.view(np.float32), np.ones(size, dtype=np.int64)
        else:
            counts += np.bincount(values, minlength=1 << 16)
    if info.dtype != "F32":
        present = np.flatnonzero(counts)
        numbers = mx.array(present.astype(np.uint16)).view(getattr(mx, MLX_DTYPES[info.dtype]))
        yield np.array(numbers.astype(mx.float32)), counts[present]


def _change(
    name: str, pieces: Iterable[tuple[np.ndarray, np.ndarray]], code: str
) -> tuple[float, int]:
    """A tensor's relative change in norm, and how many of its numbers become zeros.

    Raises:
        MintError: a finite number becomes infinite in float16.
    """
    error = energy = 0.0
    zeros = 0
    for exact, counts in pieces:
        cast = mx.array(exact).astype(getattr(mx, MLX_DTYPES[code])).astype(mx.float32)
        values = np.array(cast)
        finite = np.isfinite(exact)
        if not np.isfinite(values[finite]).all():
            raise MintError(f"{name} {TOO_LARGE}")
        wide = exact[finite].astype(np.float64)
        error += float((counts[finite] * (values[finite] - wide) ** 2).sum())
        energy += float((counts[finite] * wide**2).sum())
        zeros += int(counts[finite & (values == 0) & (exact != 0)].sum())
    return (error / energy) ** 0.5 if energy else 0.0, zeros
