"""Reads finished shards back, once: the bytes that were written, and finite numbers.

Hashes and numbers are checked block by block, in as many threads as there are cores.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...base.errors import NOT_FINITE, MintError
from ...base.quant_config import KEEP, QuantConfig
from ...base.threads import in_threads
from ...checkpoint.arrays import FLOATS, INFINITY, bits_finite
from ...checkpoint.layers import MLX_DTYPES, Inventory
from ...checkpoint.layout import Layout, Placed
from ..quantizers.rtn import is_finite

BLOCK = 1 << 22  # bytes at once: few enough for the CPU's cache
WORKERS = 8  # threads at most


class VerificationError(RuntimeError):
    """The written checkpoint differs from the plan: a bug here, or a disk that lost bytes."""


def read_back(
    folder: Path,
    layout: Layout,
    hashes: Mapping[str, str],
    choice: Mapping[str, QuantConfig],
    inventory: Inventory,
    allow_nonfinite: bool = False,
) -> None:
    """Read every tensor and compare it with what was written; refuse numbers that aren't finite.

    Args:
        folder: the finished shards.
        layout: where each tensor lies.
        hashes: SHA-256 of each tensor by name.
        choice: the configuration of each layer.
        inventory: the source's layers, for the refusal.
        allow_nonfinite: don't refuse NaN and infinite numbers.

    Raises:
        VerificationError: a tensor was never written.
        MintError: the disk holds other bytes, or a number is NaN or infinite.
    """
    if missing := layout.tensors.keys() - hashes.keys():
        raise VerificationError(f"{min(missing)} was not written")
    modules: dict[str, list[str]] = {}
    for name in layout.tensors:
        modules.setdefault(name.rpartition(".")[0], []).append(name)

    def check(path: str) -> None:
        packed: dict[str, mx.array] = {}
        for name in modules[path]:
            place = layout.tensors[name]
            file = folder / layout.names[place.shard]
            kept = name.endswith((".scales", ".biases"))
            digest, finite, data = _read(file, place, kept)
            check_hash(name, file, digest, hashes[name])
            if not (finite or allow_nonfinite):
                raise MintError(_not_finite(name, path, choice, inventory))
            if kept:
                packed[name.rpartition(".")[2]] = _as_array(data, place)

        config = choice.get(path, KEEP)
        if config.quantized and "scales" in packed and not allow_nonfinite:
            with mx.stream(mx.cpu):
                if not is_finite(packed, config):
                    raise MintError(_not_finite(path, path, choice, inventory))

    in_threads(check, ((path,) for path in modules), WORKERS)


def check_hash(tensor: str, file: Path, actual: str, wanted: str) -> None:
    """Refuse a tensor that is not what was written (a MintError)."""
    if actual != wanted:
        raise MintError(
            f"{tensor} in {file} is not what was written: run the same command again, and check "
            "the disk if that happens twice"
        )


def _read(file: Path, place: Placed, kept: bool) -> tuple[str, bool, bytearray]:
    """A tensor's hash, whether its numbers are finite, and its bytes where they are `kept`."""
    digest, data = hashlib.sha256(), bytearray()
    dtype = place.spec.dtype
    finite = True
    for block in _blocks(file, place.offset, place.spec.nbytes):
        digest.update(block)
        if dtype in FLOATS and finite:
            bits = np.frombuffer(block, np.uint32 if dtype == "F32" else np.uint16)
            finite = bits_finite(bits, INFINITY[getattr(mx, MLX_DTYPES[dtype])])
        if kept:
            data += block
    return digest.hexdigest(), finite, data


def _blocks(path: Path, start: int, count: int) -> Iterator[memoryview]:
    """Some bytes of a file, in blocks that are overwritten by the next; fewer where it ends."""
    buffer = memoryview(bytearray(min(BLOCK, count)))
    end = start + count
    with path.open("rb", buffering=0) as file:
        while start < end:
            size = os.preadv(file.fileno(), [buffer[: end - start]], start)
            if not size:
                return
            yield buffer[:size]
            start += size


def _as_array(data: bytearray, place: Placed) -> mx.array:
    """A tensor's bytes as an array."""
    dtype: mx.Dtype = getattr(mx, MLX_DTYPES[place.spec.dtype])
    with mx.stream(mx.cpu):
        return mx.array(np.frombuffer(data, np.uint8)).view(dtype).reshape(place.spec.shape)


def _not_finite(
    name: str, path: str, choice: Mapping[str, QuantConfig], inventory: Inventory
) -> str:
    """The refusal of a tensor, or of a layer's codes, that aren't finite as they were written."""
    stored = {layer.path: layer.stored or KEEP for layer in inventory.layers}
    if choice.get(path, KEEP) in (KEEP, stored.get(path, KEEP)):
        return f"{name} {NOT_FINITE}"
    return (
        f"{name} would hold NaN or infinite values in this configuration: give --override "
        f"'{path}=keep', or leave the layer at another configuration"
    )
