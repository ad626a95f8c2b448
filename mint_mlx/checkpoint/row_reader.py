"""Reads rows of layers straight from the shards, without the rest of the layer.

mlx-lm maps tensors to modules in each family's `sanitize`. A parameter that is a loaded tensor
itself, rows of one, or a stack of loaded tensors, can be read a row at a time; one that was
transposed or dequantized can't, since evaluating a slice of it evaluates all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.errors import MintError
from ..base.safetensors_header import ITEMSIZE, TensorInfo, read_header
from .arrays import FLOATS, cast
from .layers import MLX_DTYPES, Layer
from .source import Source
from .straight import Piece, source_parameters

Header = tuple[dict[str, TensorInfo], int]  # tensors by name, and where the data begins


@dataclass(frozen=True)
class Straight:
    """Where the rows of a layer lie in the shards.

    Attributes:
        matrices: (file, first byte) of each expert's matrix, in order.
        rows, columns: of each matrix.
        dtype: safetensors code, as in the files.
    """

    matrices: tuple[tuple[str, int], ...]
    rows: int
    columns: int
    dtype: str

    def read(self, source: Source, layer: Layer, experts: np.ndarray, rows: np.ndarray) -> mx.array:
        """Rows (n, k) of experts (n,) as an array (n, k, columns) in the layer's written type."""
        out = np.empty((*rows.shape, self.columns), dtype=FLOATS[self.dtype])
        row_bytes = self.columns * out.itemsize
        with ExitStack() as stack:
            files: dict[str, int] = {}
            for expert, some_rows, buffer in zip(experts.tolist(), rows, out, strict=True):
                name, start = self.matrices[expert]
                if name not in files:
                    files[name] = os.open(source.path / name, os.O_RDONLY)
                    stack.callback(os.close, files[name])
                # Rows that follow each other are read at once.
                runs = np.flatnonzero(np.diff(some_rows) != 1) + 1
                for first, end in pairwise([0, *runs.tolist(), len(some_rows)]):
                    position = start + int(some_rows[first]) * row_bytes
                    _read_into(files[name], buffer[first:end], position)
        return self._array(out, layer)

    def chunks(self, size: int) -> Iterator[slice]:
        """All rows in order, `size` weights at a time; numbered through all matrices."""
        step = max(1, size // self.columns)
        total = len(self.matrices) * self.rows
        return (slice(start, min(start + step, total)) for start in range(0, total, step))

    def load(self, source: Source, layer: Layer, rows: slice) -> mx.array:
        """The rows of a chunk as an array (rows, columns) in the layer's written type."""
        out = np.empty((rows.stop - rows.start, self.columns), dtype=FLOATS[self.dtype])
        row = rows.start
        while row < rows.stop:
            # A chunk may span the matrices of several experts.
            matrix, first = divmod(row, self.rows)
            end = min(rows.stop, row + self.rows - first)
            name, start = self.matrices[matrix]
            with (source.path / name).open("rb", buffering=0) as file:
                position = start + first * self.columns * out.itemsize
                _read_into(file.fileno(), out[row - rows.start : end - rows.start], position)
            row = end
        return self._array(out, layer)

    def _array(self, values: np.ndarray, layer: Layer) -> mx.array:
        """A copy of rows as an array in the type that the layer will be written in."""
        array = mx.array(values)
        array = array.view(mx.bfloat16) if self.dtype == "BF16" else array
        dtype: mx.Dtype = getattr(mx, MLX_DTYPES[layer.dtype])
        return cast(f"{layer.path}.weight", array, dtype)


def _read_into(file: int, rows: np.ndarray, position: int) -> None:
    """Fill an array with the bytes of a file from a position on."""
    view: Any = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    while len(view):
        count = os.preadv(file, [view], position)
        if not count:
            raise MintError("a shard was cut short while it was read: download it again")
        view, position = view[count:], position + count


def straight_layers(source: Source, layers: Sequence[Layer]) -> dict[str, Straight]:
    """The layers whose unquantized weights can be read by rows."""
    origins = source_parameters(source.path, source.structure)
    starts = {file: read_header(source.path / file)[1] for file in source.headers}
    straight: dict[str, Straight] = {}
    for layer in layers:
        origin = origins.get(f"{layer.path}.weight")
        if origin and layer.stored is None:
            located = _locate(source, layer, origin, starts)
            if located is not None:
                straight[layer.path] = located
    return straight


def _locate(
    source: Source, layer: Layer, origin: Sequence[Piece], starts: dict[str, int]
) -> Straight | None:
    """Where a layer's rows lie; None where the types or shapes of its tensors don't agree.

    Args:
        source: the checkpoint.
        layer: the layer.
        origin: the tensors that it is made of.
        starts: offset of each file's data section.
    """
    infos = [source.headers[piece.file][piece.name] for piece in origin]
    *lead, rows, columns = layer.shape
    per_tensor = int(np.prod(lead)) // len(infos)
    dtype = infos[0].dtype
    if dtype not in FLOATS:
        return None
    row_bytes = columns * np.dtype(FLOATS[dtype]).itemsize
    located = list[tuple[str, int]]()
    for piece, info in zip(origin, infos, strict=True):
        *others, height, width = info.shape if len(info.shape) > 1 else (0, 0)
        if info.dtype != dtype or width != columns or int(np.prod(others)) != per_tensor:
            return None
        # Of a stack's tensor that holds two projections a layer is some rows of each matrix.
        if piece.first + rows > height or (height != rows and len(origin) > 1):
            return None
        start = starts[piece.file] + info.start + piece.first * row_bytes
        located += [(piece.file, start + i * height * row_bytes) for i in range(per_tensor)]
    return Straight(tuple(located), rows, columns, dtype)


def read_headers(folder: Path, parameters: Iterable[Sequence[Piece]]) -> dict[str, Header]:
    """The headers of all files that parameters are made of, by name, each read once."""
    names = {piece.file for tensors in parameters for piece in tensors}
    return {name: read_header(folder / name) for name in sorted(names)}


def read_rows(
    folder: Path,
    headers: Mapping[str, Header],
    tensors: Sequence[Piece],
    experts: np.ndarray,
    rows: np.ndarray,
) -> mx.array:
    """Rows (n, k) of experts (n,) of a parameter, in the type that its files have.

    Args:
        folder: of the checkpoint.
        headers: of its files, by name (`read_headers`).
        tensors: that the parameter is made of (straight.py).
        experts, rows: numbers.

    Returns:
        (n, k, columns).
    """
    first = headers[tensors[0].file][0][tensors[0].name]
    *lead, height, columns = first.shape
    matrices = int(np.prod(lead))
    row_bytes = columns * ITEMSIZE[first.dtype]
    out = np.empty((*rows.shape, row_bytes), dtype=np.uint8)
    for expert, some_rows, buffer in zip(experts.tolist(), rows.tolist(), out, strict=True):
        file, name, skipped = tensors[expert // matrices]
        table, data = headers[file]
        start = data + table[name].start + (expert % matrices * height + skipped) * row_bytes
        with (folder / file).open("rb", buffering=0) as opened:
            for row, place in zip(some_rows, buffer, strict=True):
                _read_into(opened.fileno(), place, start + row * row_bytes)
    return mx.array(out).view(getattr(mx, MLX_DTYPES[first.dtype]))


def select_rows(weight: mx.array, experts: np.ndarray, rows: np.ndarray) -> mx.array:
    """Rows (n, k) of experts (n,) of a weight (experts, rows, columns) that is in memory."""
    if rows.shape == weight.shape[:2]:  # all of them
        return weight
    return weight[mx.array(experts)[:, None], mx.array(rows)]
