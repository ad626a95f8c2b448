"""Rows of layers, read from the shards alone where a source's tensors map straight through to the
model's.

mlx-lm maps tensors to modules in each family's `sanitize`. A parameter that is a loaded tensor
itself, or a stack of loaded tensors, can be read a row at a time; one that was split, transposed or
dequantized can't, since evaluating a slice of it evaluates all of it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.errors import MintError
from ..base.safetensors_header import read_header
from .layers import MLX_DTYPES, Layer
from .mlxlm import straight_parameters
from .source import Source

FLOATS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Straight:
    """Where a layer's rows lie.

    Attributes:
        parts: (file, first byte) of each expert's matrix, in order.
        rows, columns: of each matrix.
        dtype: as in the files.
    """

    parts: tuple[tuple[str, int], ...]
    rows: int
    columns: int
    dtype: str

    def read(self, source: Source, layer: Layer, experts: np.ndarray, rows: np.ndarray) -> mx.array:
        """Rows (n, k) of experts (n,) as an array (n, k, columns) in the type that the layer will
        be written in.
        """
        out = np.empty((*rows.shape, self.columns), dtype=FLOATS[self.dtype])
        files: dict[str, np.ndarray] = {}
        for place, expert in enumerate(experts.tolist()):
            name, start = self.parts[expert]
            if name not in files:
                mapped: Any = np.memmap(source.path / name, mode="r")
                mapped._mmap.madvise(mmap.MADV_RANDOM)  # read no neighbours
                files[name] = np.asarray(mapped)
            matrix = files[name][start : start + self.rows * self.columns * out.itemsize].view(
                out.dtype
            )
            out[place] = matrix.reshape(self.rows, self.columns)[rows[place]]
        return self._array(out, layer)

    def chunks(self, source: Source, layer: Layer, size: int) -> Iterator[mx.array]:
        """All rows in order, about `size` weights at a time: arrays (rows, columns) in the type to
        be written in.
        """
        at_once = max(1, size // self.columns)
        buffer = np.empty((at_once, self.columns), dtype=FLOATS[self.dtype])
        filled, files = 0, dict[str, int]()
        try:
            for name, start in self.parts:
                first = 0
                if name not in files:
                    files[name] = os.open(source.path / name, os.O_RDONLY)
                while first < self.rows:
                    count = min(self.rows - first, at_once - filled)
                    _read_into(
                        files[name],
                        buffer[filled : filled + count],
                        start + first * buffer[0].nbytes,
                    )
                    first, filled = first + count, filled + count
                    if filled == at_once:
                        yield self._array(buffer, layer)
                        filled = 0
            if filled:
                yield self._array(buffer[:filled], layer)
        finally:
            for file in files.values():
                os.close(file)

    def _array(self, values: np.ndarray, layer: Layer) -> mx.array:
        """A copy of rows as an array in the type that the layer will be written in."""
        found = mx.array(values)
        found = found.view(mx.bfloat16) if self.dtype == "BF16" else found
        dtype: mx.Dtype = getattr(mx, MLX_DTYPES[layer.dtype])
        return found if found.dtype == dtype else found.astype(dtype)


def _read_into(file: int, rows: np.ndarray, position: int) -> None:
    """Fill an array with a file's bytes from a position on."""
    view: Any = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    while len(view):
        count = os.preadv(file, [view], position)
        if not count:
            raise MintError(
                "a shard ended early: it was cut short while it was read, download it again"
            )
        view, position = view[count:], position + count


def straight_layers(source: Source, layers: Sequence[Layer]) -> dict[str, Straight]:
    """The layers whose unquantized weights can be read by rows."""
    origins = straight_parameters(source.path)
    starts = {file: read_header(source.path / file)[1] for file in source.headers}
    found: dict[str, Straight] = {}
    for layer in layers:
        origin = origins.get(f"{layer.path}.weight")
        place = _place(source, layer, origin, starts) if origin and layer.stored is None else None
        if place is not None:
            found[layer.path] = place
    return found


def _place(
    source: Source, layer: Layer, origin: Sequence[tuple[str, str]], starts: dict[str, int]
) -> Straight | None:
    """A layer's rows in the tensors (file, name) that it is made of, or None where types or shapes
    don't agree.
    """
    infos = [source.headers[file][name] for file, name in origin]
    *lead, rows, columns = layer.shape
    experts = int(np.prod(lead))
    held, dtype = experts // len(infos), infos[0].dtype
    if dtype not in FLOATS or any(info.dtype != dtype for info in infos):
        return None
    if any(
        info.shape[-2:] != (rows, columns) or int(np.prod(info.shape[:-2])) != held
        for info in infos
    ):
        return None
    size = rows * columns * np.dtype(FLOATS[dtype]).itemsize
    parts = tuple(
        (file, starts[file] + info.start + matrix * size)
        for (file, _), info in zip(origin, infos, strict=True)
        for matrix in range(held)
    )
    return Straight(parts, rows, columns, dtype)


def select_rows(weight: mx.array, experts: np.ndarray, rows: np.ndarray) -> mx.array:
    """The same rows of a weight (experts, rows, columns) that is in memory."""
    if rows.shape == weight.shape[:2]:  # all of them
        return weight
    return weight[mx.array(experts)[:, None], mx.array(rows)]
