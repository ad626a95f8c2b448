"""Streams a model's weights: one module after another is read, handed over and released.

Each pass over a model's weights (profile, convert) goes through here where it can't go row by row
(row_reader.py, converters/output/rowwise.py), so that memory holds one layer and those that are
read ahead. An evaluated array never becomes lazy again, so every pass opens the model anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..base.errors import NOT_FINITE, TOO_LARGE, MintError
from ..base.quant_config import QuantConfig
from ..base.streams import reading
from .arrays import all_finite, has_nan_codes
from .layers import MLX_DTYPES, Inventory
from .mlxlm import build_model
from .mtp_codes import codes, linear_weights
from .source import Source, open_model
from .towers import is_mtp
from .vlm_keys import tower_name

# Bytes that are read ahead at most. A larger layer is read only when it is wanted, since stacking
# its experts takes twice its size.
AHEAD = 1_500_000_000

Tensors = dict[str, mx.array]  # of a module, by local name


def _nbytes(tensors: dict[str, mx.array]) -> int:
    return sum(array.nbytes for array in tensors.values())


def _carried(source: Source, owners: set[str]) -> dict[str, Tensors]:
    """Lazy tensors of modules that mlx-lm's model lacks, straight from the shards."""
    tensors: dict[str, Tensors] = {}
    for file, table in source.headers.items():
        written = {name: tower_name(source.config, name) for name in table}
        if not any(name.rpartition(".")[0] in owners for name in written.values()):
            continue
        with mx.stream(reading()):
            loaded: Any = mx.load(str(source.path / file))
        for name, array in loaded.items():
            owner, _, local = written.get(name, "").rpartition(".")
            if owner in owners:
                tensors.setdefault(owner, {})[local] = array
    return tensors


def _coded(source: Source, inventory: Inventory, owners: set[str]) -> dict[str, Tensors]:
    """Lazy codes of the modules among these that are written in 8 bits (mtp_codes.py)."""
    shards = {name: file for file, table in source.headers.items() for name in table}
    tensors = {name: info for table in source.headers.values() for name, info in table.items()}
    head = {name: info for name, info in tensors.items() if is_mtp(name, source.config)}
    weights = linear_weights(head)

    def read(name: str) -> mx.array:
        loaded: Any = mx.load(str(source.path / shards[name]))
        array: mx.array = loaded[name]
        return array

    with mx.stream(reading()):
        return {
            owner: codes(weights[owner], inventory.others[owner][1].dtype, read)
            for owner in owners & inventory.coded.keys() & weights.keys()
        }


def written_dtypes(inventory: Inventory) -> dict[str, str]:
    """The safetensors code of each parameter as it will be written; none for packed codes."""
    dtypes = {spec.name: spec.dtype for specs in inventory.others.values() for spec in specs}
    for layer in inventory.layers:
        dtypes |= {spec.name: spec.dtype for spec in layer.extras}
        if layer.stored is None:
            dtypes[f"{layer.path}.weight"] = layer.dtype
        elif layer.stored.mode == "affine":
            dtypes |= dict.fromkeys((f"{layer.path}.scales", f"{layer.path}.biases"), layer.dtype)
    return dtypes


def _check_stored(inventory: Inventory, arrays: dict[str, dict[str, mx.array]]) -> None:
    """Refuse layers whose codes are not those that were planned before they were downloaded.

    Raises:
        MintError: naming the first one.
    """
    for layer in inventory.layers:
        if layer.stored and "scales" not in arrays.get(layer.path, {"scales": None}):
            raise MintError(
                f"{layer.path} cannot stay as it is, though its config.json says so (its columns "
                "are reordered): leave --low-disk out"
            )


def _check_finite(
    source: Source,
    path: str,
    tensors: dict[str, mx.array],
    stored: QuantConfig | None,
    allow_nonfinite: bool,
) -> None:
    """Refuse a module's parameters that are NaN or infinite; `stored` says how it is quantized.

    Raises:
        MintError: naming the tensor, and whether the source holds it so or float16 cannot hold it
            (which is refused in any case).
    """
    if stored is not None and not allow_nonfinite and has_nan_codes(tensors, stored):
        raise MintError(f"{path} {NOT_FINITE}")
    for local, array in tensors.items():
        is_half = array.dtype == mx.float16
        if (allow_nonfinite and not is_half) or all_finite(array):
            continue
        name = f"{path}.{local}".lstrip(".")
        if is_half and _is_finite_in_source(source, name):
            raise MintError(f"{name} {TOO_LARGE}")
        if not allow_nonfinite:
            raise MintError(f"{name} {NOT_FINITE}")


def _is_finite_in_source(source: Source, name: str) -> bool:
    """Whether a parameter is finite in the types of the source's files."""
    model = build_model(
        source.path, reading(), exact=True, dtype=mx.float32, keep_nvfp4=source.keep_nvfp4
    )
    array = dict(tree_flatten(model.parameters())).get(name)
    if array is None:
        return False
    mx.eval(array)
    return all_finite(array)


def stream(
    source: Source, inventory: Inventory, paths: Sequence[str], allow_nonfinite: bool = False
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Yield each module's evaluated parameters by local name, in the types they are written in.

    Args:
        source: a checkpoint whose weights are on this machine.
        inventory: its layers, for the types.
        paths: the modules wanted, in the model's order (two that share a fused source tensor stand
            side by side there).
        allow_nonfinite: don't refuse NaN and infinite weights.

    Raises:
        MintError: weights aren't finite, or a layer's codes aren't those that its config promised.
    """
    wanted = set(paths)
    arrays: dict[str, dict[str, mx.array]] = {}
    model = open_model(source, reading(), exact=True)
    for name, array in tree_flatten(model.parameters()):
        owner, _, local = name.rpartition(".")
        if owner in wanted:
            arrays.setdefault(owner, {})[local] = array
    arrays |= _carried(source, wanted - arrays.keys())
    if inventory.coded:
        arrays |= _coded(source, inventory, wanted)
    _check_stored(inventory, arrays)
    if paths:
        del model, array  # now only `arrays` holds the lazy weights, and frees them one by one

    dtypes = written_dtypes(inventory)
    stored = {layer.path: layer.stored for layer in inventory.layers}

    def start_reading(path: str) -> dict[str, mx.array]:
        tensors = arrays.pop(path)
        with mx.stream(reading()):  # reading never happens inside a GPU command buffer
            for local, array in tensors.items():
                code = dtypes.get(f"{path}.{local}".lstrip("."))
                # (Those of foreign formats stay exact until they are written.)
                if local in ("scales", "biases") and array.dtype == mx.float32:
                    continue
                if code is not None:
                    dtype = getattr(mx, MLX_DTYPES[code].replace("bool", "bool_"))
                    tensors[local] = array if array.dtype == dtype else array.astype(dtype)
        mx.async_eval(tensors)
        return tensors

    # The next modules are read while the caller works on this one, as far as `room` allows.
    room = min(AHEAD, max((_nbytes(arrays[path]) for path in paths), default=0))
    started: deque[dict[str, mx.array]] = deque()
    waiting = deque(paths)
    for path in paths:
        if not started:
            started.append(start_reading(waiting.popleft()))
        tensors = started.popleft()
        mx.eval(tensors)

        ahead = sum(map(_nbytes, started))
        while waiting and ahead + _nbytes(arrays[waiting[0]]) <= room:
            started.append(start_reading(waiting.popleft()))
            ahead += _nbytes(started[-1])

        _check_finite(source, path, tensors, stored.get(path), allow_nonfinite)
        yield path, tensors
        del tensors
        mx.clear_cache()
