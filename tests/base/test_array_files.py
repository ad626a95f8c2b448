"""Files of arrays: read back exactly; a changed byte is seen; sizes are checked before memory."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mint_mlx.base.array_files import (
    read_arrays,
    read_npz,
    read_tensors,
    write_arrays,
    write_npz,
    write_tensors,
)
from mint_mlx.base.checksum import Damaged

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.c": np.array([True, False]),
    "none": np.zeros((0, 4), dtype=np.uint16),
    "one": np.array(7),
    "text": np.array("head"),
}
NUMBERS = {name: array for name, array in ARRAYS.items() if name != "text"}
TENSORS = {"h": mx.arange(6, dtype=mx.bfloat16).reshape(2, 3), "none": mx.zeros((0, 2))}


def same(read: dict[str, np.ndarray], written: dict[str, np.ndarray]) -> bool:
    return read.keys() == written.keys() and all(
        np.array_equal(read[n], a) and read[n].dtype == a.dtype for n, a in written.items()
    )


def test_arrays_are_read_back(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.safetensors", NUMBERS, {"about": "x"})
    read, about = read_arrays(tmp_path / "a.safetensors")
    assert same(read, NUMBERS)
    assert about["about"] == "x"
    for compressed in (False, True):
        write_npz(tmp_path / "a.npz", ARRAYS, compressed)
        assert same(read_npz(tmp_path / "a.npz"), ARRAYS)

    write_tensors(tmp_path / "t.safetensors", TENSORS)
    tensors = read_tensors(tmp_path / "t.safetensors")
    assert tensors.keys() == TENSORS.keys()
    assert all(tensors[n].dtype == TENSORS[n].dtype for n in TENSORS)
    assert mx.array_equal(tensors["h"], TENSORS["h"])


def test_files_of_earlier_versions_have_no_checksum(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS)  # type: ignore[arg-type]
    assert same(read_npz(tmp_path / "a.npz", old=True), ARRAYS)
    save_file(NUMBERS, tmp_path / "a.safetensors")
    assert same(read_arrays(tmp_path / "a.safetensors", old=True)[0], NUMBERS)
    with pytest.raises(Damaged):
        read_arrays(tmp_path / "a.safetensors")


def _write(kind: str, path: Path) -> Callable[[], Any]:
    """Write a file, and return what reads it into comparable data."""
    if kind == "npz":
        write_npz(path, ARRAYS)
        return lambda: {n: (a.dtype.str, a.tolist()) for n, a in read_npz(path).items()}
    if kind == "safetensors":
        write_arrays(path, NUMBERS, {"about": "x"})
        return lambda: {n: (a.dtype.str, a.tolist()) for n, a in read_arrays(path)[0].items()}
    write_tensors(path, TENSORS)
    return lambda: {n: (str(a.dtype), a.tolist()) for n, a in read_tensors(path).items()}


@pytest.mark.parametrize("kind", ["npz", "safetensors", "mlx"])
def test_no_changed_byte_gives_other_arrays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    read = _write(kind, path)
    expected = read()
    whole = path.read_bytes()
    for place in range(0, len(whole), 2):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 7
        path.write_bytes(changed)
        try:
            assert read() == expected
        except Damaged:
            continue
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read()


def _npz(header: bytes, body: bytes) -> bytes:
    """An .npz of one array of this header."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        length = len(header).to_bytes(2, "little")
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + length + header + body)
    return out.getvalue()


HEADER = b"{'descr': '%s', 'fortran_order': False, 'shape': (%s,), }"


@pytest.mark.parametrize(
    "data",
    [
        _npz(HEADER % (b"<f8", b"1000000000000"), b"x"),  # more than the file has
        _npz(HEADER % (b"<f8", b"-1"), b"x" * 8),
        _npz(HEADER % (b"O", b"1"), b"x" * 8),
        _npz(HEADER % (b"<f4", b"50000000"), bytes(200_000_000)),  # a thousand times the file
    ],
    ids=["huge", "negative", "objects", "inflating"],
)
def test_sizes_are_checked_before_memory_is_taken(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            read_npz(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
