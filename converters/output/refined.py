"""What refining changed, stored in the work folder until it is in the shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...base.array_files import read_tensors
from ...base.checksum import Damaged, if_sound
from ...base.folders import SCRATCH
from ...base.remove import remove_file
from ...checkpoint.arrays import flat_view
from ...checkpoint.layers import MLX_DTYPES
from ...checkpoint.layout import Layout, TensorSpec

REFINED = f"{SCRATCH}refined.safetensors"


def read_refined(work: Path, layout: Layout) -> dict[str, mx.array] | None:
    """The refined tensors by name; None where there are none, or damaged ones, which are deleted.

    Args:
        work: the work folder.
        layout: the tensors of the checkpoint.
    """

    def read(file: Path) -> dict[str, mx.array]:
        tensors = read_tensors(file)
        for name, array in tensors.items():
            place = layout.tensors.get(name)
            if place is None or not _is_tensor(array, place.spec):
                raise Damaged(f"{file} is damaged")
        return tensors

    file = work / REFINED
    refined = if_sound(file, read)
    if refined is None:
        remove_file(file)
    return refined


def _is_tensor(array: mx.array, spec: TensorSpec) -> bool:
    """Whether an array has a tensor's type and shape."""
    return str(array.dtype) == f"mlx.core.{MLX_DTYPES[spec.dtype]}" and array.shape == spec.shape


def hashes_of(tensors: Mapping[str, mx.array]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes in hex, by name."""
    return {
        name: hashlib.sha256(flat_view(array, np.uint8).data).hexdigest()
        for name, array in tensors.items()
    }
