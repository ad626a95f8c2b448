"""Safetensors headers, read strictly and without touching a weight.

A header says where each tensor of a file lies. Files come from strangers, so a header that claims
more than the file holds, overlaps or points elsewhere is refused here, before anything is mapped.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .errors import MintError

ITEMSIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `start` and `end` are bytes from the beginning of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Read one file's header: tensors by name, and the offset of the data section.

    Raises:
        MintError: the file is truncated, not a safetensors file, or its header contradicts itself.
    """
    if not path.is_file():
        raise MintError(
            f"{path.name} is not a regular file (perhaps a broken link): download it again"
        )
    size = path.stat().st_size

    # The length comes first, so that a file of another kind is never read as a huge header.
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise MintError(f"{path.name} is truncated ({size} bytes): download it again")
        (length,) = struct.unpack("<Q", start)
        if start == b"version ":
            raise MintError(
                f"{path.name} is a pointer of Git LFS, not the weights: run `git lfs pull`, or "
                "download it"
            )
        if length > MAX_HEADER or length < 2:
            raise _not_safetensors(path.name, f"its header length reads {length}")
        if 8 + length > size:
            raise MintError(
                f"{path.name} is truncated inside its header ({size} bytes): download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _not_safetensors(path.name, "its header is not JSON") from None
    tensors = parse_header(header, path.name)

    # parse_header leaves no gaps, so the end of the last tensor is the end of the file.
    needed = 8 + length + max((t.end for t in tensors.values()), default=0)
    if needed != size:
        problem = "truncated" if size < needed else "longer than its header says"
        raise MintError(f"{path.name} is {problem} ({size} of {needed} bytes): download it again")
    return tensors, 8 + length


def stated_format(path: Path) -> str | None:
    """The library that a file says to be written for: `pt`, `mlx`; None where it says nothing.

    The file's header was read before, so that it is a safetensors file.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__")
    stated = metadata.get("format") if isinstance(metadata, dict) else None
    return stated if isinstance(stated, str) else None


def parse_header(header: Any, name: str) -> dict[str, TensorInfo]:
    """Check a decoded header and return its tensors by name, in the file's order of data.

    Raises:
        MintError: an entry is malformed, overlaps another one or leaves a gap.
    """
    if not isinstance(header, dict):
        raise _not_safetensors(name, "its header is not a table")
    tensors = {
        tensor: _parse_entry(tensor, entry, name)
        for tensor, entry in header.items()
        if tensor != "__metadata__"
    }

    # Data without gaps, as safetensors itself demands: two names never share bytes.
    position = 0
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    for tensor, info in ordered.items():
        if info.start != position:
            raise _damaged(name, f"{tensor!r} overlaps another tensor or leaves a gap")
        position = info.end
    return ordered


def _parse_entry(tensor: str, entry: Any, name: str) -> TensorInfo:
    """One tensor's entry in the header of the file `name`.

    Raises:
        MintError: it is malformed.
    """
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(name, f"the header's entry for {tensor!r} is malformed") from None
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise MintError(
            f"{name}: {tensor!r} has the unknown type {dtype!r}: give the checkpoint in bf16"
        )
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end)):
        raise _damaged(name, f"{tensor!r} has an impossible shape or position")
    needed = prod(shape) * ITEMSIZE[dtype]
    if end - start != needed:
        extent = f"{dtype} of shape {list(shape)} takes {needed}"
        raise _damaged(name, f"{tensor!r} has {end - start} bytes, but {extent}")
    return TensorInfo(dtype, shape, start, end)


def _not_safetensors(name: str, why: str) -> MintError:
    return MintError(f"{name} is not a safetensors file ({why}): download it again")


def _damaged(name: str, why: str) -> MintError:
    return MintError(f"{name} is damaged ({why}): download it again")


WHOLE = "model.safetensors"
COMPARED = 1024  # bytes of each tensor


def read_folder(folder: Path) -> dict[str, dict[str, TensorInfo]]:
    """Headers of all weight files of a checkpoint by file name: each tensor once.

    The files are those that its index names, and all model*.safetensors. Of several copies of a
    tensor the index decides. Of a file that it doesn't name, which an earlier save may have left,
    only tensors that it lists are read; a file of which no tensor is used is left out. Where none
    of its shards is there, it says nothing of a `model.safetensors`, which is whole.

    Raises:
        MintError: no weights, a shard is missing, two copies of a tensor of which no index says
            which one counts, or other weights in `model.safetensors` than in the index's shards.
    """
    listed = read_index(folder)
    files = {file.name for file in folder.glob("model*.safetensors")}
    present = {shard for shard in set(listed.values()) if (folder / shard).exists()}
    if WHOLE in files and not present:
        listed = {}
    files |= present
    headers = {name: read_header(folder / name)[0] for name in sorted(files)}

    # An index that is out of date does no harm where all that it lists is there.
    holders: dict[str, list[str]] = {}
    for name, tensors in headers.items():
        for tensor in tensors:
            holders.setdefault(tensor, []).append(name)
    missing = sorted({shard for tensor, shard in listed.items() if tensor not in holders})
    absent = [shard for shard in missing if shard not in files]
    if absent:
        _refuse_renamed(folder, files, {t for t in listed if t not in holders}, absent[0])
        raise MintError(
            f"{folder.name} is incomplete: {absent[0]} is missing ({len(absent)} of "
            f"{len(set(listed.values()))} shards); download it again"
        )
    if not files:
        raise MintError(_no_weights(folder))
    for tensor, shard in listed.items():
        if tensor not in holders:
            raise MintError(
                f"{INDEX} places {tensor!r} in {shard}, where it is not: download the checkpoint "
                "again"
            )

    # mlx-lm loads every model*.safetensors: a second copy would silently replace the first.
    for tensor, names in holders.items():
        if len(names) > 1 and listed.get(tensor) not in names:
            raise MintError(
                f"{folder.name} holds two copies of its weights ({tensor} is in {names[0]} and "
                f"{names[1]}), and no index says which one counts: delete one of them"
            )
    _refuse_another_whole(folder, headers, listed)
    named = set(listed.values())
    used = {
        name: {
            tensor: info
            for tensor, info in tensors.items()
            if (len(holders[tensor]) == 1 or listed[tensor] == name)
            and (not listed or name in named or tensor in listed)
        }
        for name, tensors in headers.items()
    }
    return {name: tensors for name, tensors in used.items() if tensors}


def _refuse_another_whole(
    folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]], listed: Mapping[str, str]
) -> None:
    """Refuse a `model.safetensors` beside shards of other weights, as saving twice leaves it.

    transformers reads the file that is whole, other programs go by the index. A few bytes of each
    tensor are compared. Zeros may be a file of which the data isn't downloaded yet.

    Raises:
        MintError: they differ.
    """
    for tensor, info in headers.get(WHOLE, {}).items():
        shard = listed.get(tensor, WHOLE)
        other = headers.get(shard, {}).get(tensor)
        if shard == WHOLE or other is None:
            continue
        first, second = _middle(folder / WHOLE, info), _middle(folder / shard, other)
        if any(first) and any(second) and first != second:
            raise MintError(
                f"{folder.name} holds two models: {tensor} in {WHOLE} is another than in {shard}, "
                f"which {INDEX} names: delete {WHOLE}, or the index and its shards"
            )


def _middle(path: Path, info: TensorInfo) -> bytes:
    """The bytes in the middle of a tensor."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        size = min(COMPARED, info.end - info.start)
        file.seek(8 + length + info.start + (info.end - info.start - size) // 2)
        return file.read(size)


def _refuse_renamed(folder: Path, files: set[str], tensors: set[str], absent: str) -> None:
    """Refuse a folder whose index names files that are there under other names.

    Args:
        folder: of the checkpoint.
        files: that were read already.
        tensors: that the index lists and none of them holds.
        absent: the first file that the index names and isn't there.

    Raises:
        MintError: naming the other files, where they hold all those tensors.
    """
    others = sorted({file.name for file in folder.glob("*.safetensors")} - files)
    held: set[str] = set()
    for other in others:
        try:
            held |= read_header(folder / other)[0].keys()
        except MintError:  # it is missing, as far as this is concerned
            continue
    if tensors <= held:
        raise MintError(
            f"{INDEX} in {folder.name} names {absent}, which is not there, but its tensors are in "
            f"{others[0]}: rename the files as the index names them, or correct the index"
        )


def index_notes(folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """What of a checkpoint's index and files doesn't agree, though each tensor is there.

    Args:
        folder: of the checkpoint.
        headers: from `read_folder`.
    """
    listed = read_index(folder)
    notes = []
    misplaced = [name for name, shard in listed.items() if name not in headers.get(shard, {})]
    if misplaced:
        notes.append(
            f"{INDEX} is out of date: {misplaced[0]} is not in {listed[misplaced[0]]} "
            f"({len(misplaced)} such tensors). Every tensor is in another file, and read from there"
        )
    unused = sorted({file.name for file in folder.glob("model*.safetensors")} - headers.keys())
    unlisted = [name for name in unused if not listed.keys() & read_header(folder / name)[0].keys()]
    copies = [name for name in unused if name not in unlisted]
    if copies and listed:
        notes.append(
            f"{copies[0]} holds a second copy of tensors, which is not read: the index names "
            f"another file ({len(copies)} such files)"
        )
    if unlisted and listed:
        notes.append(
            f"{unlisted[0]} is not read: the index doesn't name it, nor what it holds "
            f"({len(unlisted)} such files)"
        )
    return notes


def read_index(folder: Path) -> dict[str, str]:
    """The shard of each tensor by a checkpoint's index; an empty table where it has none.

    Raises:
        MintError: the index is damaged, or names a file that can't be a shard.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(tensor): str(shard) for tensor, shard in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MintError(
            f"{path.name} in {folder.name} is not a safetensors index: download it again"
        ) from None
    for shard in listed.values():
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise MintError(
                f"{path.name} names the shard {shard!r}, which is not a plain file name: refused, "
                "get the checkpoint from a source that you trust"
            )
        if not shard.endswith(".safetensors"):
            raise MintError(
                f"{path.name} names {shard!r}, which is not a safetensors file: give a checkpoint "
                "in safetensors"
            )
    return listed


def _no_weights(folder: Path) -> str:
    """The message for a folder without safetensors, by what it holds instead."""
    if any(file.suffix.lower() == ".gguf" for file in folder.iterdir()):
        return (
            f"{folder.name} holds a GGUF file: give the original Hugging Face checkpoint "
            "(safetensors) instead"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return f"{folder.name} holds PyTorch files only: give a checkpoint in safetensors instead"
    other = next((file.name for file in sorted(folder.glob("*.safetensors"))), None)
    if other is not None:
        return (
            f"{folder.name} holds no model*.safetensors, but {other}, which no "
            f"{INDEX} names: give a Hugging Face checkpoint, or rename its files to "
            "model*.safetensors where they hold one"
        )
    return (
        f"{folder.name} holds no model*.safetensors: give a Hugging Face checkpoint in safetensors"
    )
