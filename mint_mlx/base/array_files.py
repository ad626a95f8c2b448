"""Arrays in files, with a checksum: written whole or not at all, read with suspicion.

Sizes are held against the file before anything is allocated. Arrays of numpy go into .npz or
.safetensors, arrays of MLX (bfloat16 among them) into .safetensors.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checksum import KEY, Damaged
from .errors import MintError
from .files import atomic_write
from .safetensors_header import TensorInfo, read_header

if TYPE_CHECKING:
    import mlx.core as mx

INFLATED = 40  # times its size that an .npz may grow to: text compresses so, numbers hardly at all
SMALL = 64_000_000  # bytes that it may grow to in any case
TYPES = ("BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64")
_BROKEN = (  # all that zip, zlib and numpy raise of damaged files
    *(ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError),
    *(SyntaxError, OverflowError, MemoryError, RecursionError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
Entry = tuple[str, str, tuple[int, ...], Any]  # name, type, shape, bytes


def _digest(entries: Iterable[Entry], about: Mapping[str, str]) -> str:
    """One checksum of arrays, in the order of their names, and of what stands beside them."""
    digest = hashlib.blake2b(repr(sorted(about.items())).encode(), digest_size=16)
    for name, dtype, shape, data in entries:
        digest.update(f"\n{name} {dtype} {list(shape)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _numpy_entries(arrays: Mapping[str, np.ndarray]) -> Iterable[Entry]:
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        yield name, array.dtype.str, arrays[name].shape, array.reshape(-1).view(np.uint8).data


def _mlx_entries(arrays: Mapping[str, mx.array]) -> Iterable[Entry]:
    import mlx.core as mx

    for name in sorted(arrays):
        array = arrays[name]
        flat = array.reshape(-1)
        data = memoryview(flat.view(mx.uint8)) if array.size else b""  # type: ignore[arg-type]
        yield name, str(array.dtype), tuple(array.shape), data


def write_arrays(
    path: Path, arrays: dict[str, np.ndarray], about: dict[str, str] | None = None
) -> None:
    """Write numpy arrays as a .safetensors file, atomically, with its folder where there is none.

    Args:
        path: the file.
        arrays: by name.
        about: metadata for the file's header.

    Raises:
        OSError: as for any other file (safetensors has an error of its own).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    about = {key: value for key, value in (about or {}).items() if key != KEY}
    about[KEY] = _digest(_numpy_entries(arrays), about)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        try:
            save_file(arrays, partial, metadata=about)
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
            raise


def read_arrays(path: Path, old: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read what `write_arrays` wrote: the arrays, and the metadata with its checksum.

    Args:
        path: the file.
        old: take a file without a checksum as well. Damage may have hidden it, so the file must say
            elsewhere that it has one.

    Raises:
        Damaged: it isn't such a file any more.
        OSError: it can't be read.
    """
    from safetensors import SafetensorError, safe_open

    _header(path)
    try:
        with safe_open(path, framework="numpy") as file:
            about: dict[str, str] = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, *_BROKEN):
        raise Damaged(f"{path} is damaged") from None
    others = {key: value for key, value in about.items() if key != KEY}
    if (KEY in about or not old) and about.get(KEY) != _digest(_numpy_entries(arrays), others):
        raise Damaged(f"{path} is damaged (its checksum is wrong)")
    return arrays, about


def write_tensors(path: Path, tensors: dict[str, mx.array]) -> None:
    """Write MLX arrays into a .safetensors file, atomically."""
    import mlx.core as mx

    checksum = _digest(_mlx_entries(tensors), {})
    with atomic_write(path) as partial:
        mx.save_safetensors(str(partial), tensors, {KEY: checksum})


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read what `write_tensors` wrote into memory at once, so that the file may be deleted.

    Raises:
        Damaged: it isn't such a file any more.
        OSError: it can't be read.
    """
    import mlx.core as mx

    _header(path)
    try:
        with mx.stream(mx.cpu):
            loaded: Any = mx.load(str(path), return_metadata=True)
            tensors: dict[str, mx.array] = loaded[0]
            about: dict[str, str] = loaded[1]
            mx.eval(tensors)
    except _BROKEN:
        raise Damaged(f"{path} is damaged") from None
    if about.get(KEY) != _digest(_mlx_entries(tensors), {}):
        raise Damaged(f"{path} is damaged (its checksum is wrong)")
    return tensors


def _header(path: Path) -> dict[str, TensorInfo]:
    """The header of a .safetensors file, of which no entry is larger than the file says.

    Raises:
        Damaged: it is malformed, or holds a type that no file of ours has.
    """
    try:
        header = read_header(path)[0]
    except MintError:
        raise Damaged(f"{path} is damaged") from None
    if any(info.dtype not in TYPES for info in header.values()):
        raise Damaged(f"{path} is damaged (an array of another type)")
    return header


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], compressed: bool = False) -> None:
    """Write numpy arrays as an .npz file, atomically, with its folder where there is none."""
    checksum = np.array(_digest(_numpy_entries(arrays), {}))
    save: Any = np.savez_compressed if compressed else np.savez
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as file:
        save(file, **arrays, **{KEY: checksum})


def read_npz(path: Path, old: bool = False) -> dict[str, np.ndarray]:
    """Read what `write_npz` wrote.

    Args:
        path: the file.
        old: take a file without a checksum as well. Damage may have hidden it together with other
            arrays, so the file must say elsewhere that it has one: it is in the result then.

    Raises:
        Damaged: it isn't such a file any more, or would inflate to many times its size.
        OSError: it can't be read.
    """
    arrays: dict[str, np.ndarray] = {}
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > max(SMALL, INFLATED * len(content)):
                raise Damaged(f"{path} is damaged (it would inflate to {total} bytes)")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise Damaged(f"{path} is damaged (two arrays of one name)")
                arrays[name] = _read_member(archive, member)
    except _BROKEN:
        raise Damaged(f"{path} is damaged") from None
    checksum = arrays.pop(KEY, None)
    if checksum is None and old:
        return arrays
    if str(checksum) != _digest(_numpy_entries(arrays), {}):
        raise Damaged(f"{path} is damaged (its checksum is wrong)")
    return arrays | {KEY: checksum} if old and checksum is not None else arrays


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array of an .npz file.

    Raises:
        ValueError: its header says another size than the file has, or a type that holds no numbers.
    """
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("another compression")
    data = io.BytesIO(archive.read(member))
    version = np.lib.format.read_magic(data)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](data)
    if dtype.kind not in "biufU" or dtype.subdtype is not None or min(shape, default=0) < 0:
        raise ValueError("no array of numbers or text")
    if data.tell() + prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError("another size than the header says")
    data.seek(0)
    array: np.ndarray = np.lib.format.read_array(data, allow_pickle=False)
    return array
