"""One module after another: read, hand over, release.

What passes over a model's weights (profile, convert) goes through here where it can't go row by row (rows.py,
converters/rowwise.py), so that memory holds one layer at a time, and the next one on its way. An evaluated array never
becomes lazy again, so every pass opens the model anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .errors import NOT_FINITE, MintError
from .layers import MLX_DTYPES, Inventory, Layer
from .load import Source, open_model
from .streams import reading

AHEAD = 1_500_000_000  # bytes read ahead; a larger layer waits its turn, since stacking its experts takes twice that
INFINITY = {mx.bfloat16: 0x7F80, mx.float16: 0x7C00, mx.float32: 0x7F800000}  # its bits; those of NaN lie above
PIECE = 1 << 16  # numbers looked at at once: small enough for the CPU's cache


def check_finite(path: str, tensors: dict[str, mx.array]) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        MintError: naming the tensor.
    """
    for name, array in tensors.items():
        if not all_finite(array):
            raise MintError(f"{path}.{name} {NOT_FINITE}")


def all_finite(array: mx.array) -> bool:
    """Whether an evaluated array holds neither NaN nor infinity, which alone have every bit of the exponent set.

    numpy looks at the bits four times as fast as MLX sums them on a CPU.
    """
    if not mx.issubdtype(array.dtype, mx.floating) or not array.size:
        return True
    bits = flat_view(array, mx.uint16 if array.itemsize == 2 else mx.uint32)
    infinity = INFINITY[array.dtype]
    without_sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    pieces = (bits[i : i + PIECE] for i in range(0, bits.size, PIECE))
    return all(int((piece & without_sign).max()) < infinity for piece in pieces)


def flat_view(array: mx.array, kind: mx.Dtype) -> np.ndarray:
    """An evaluated array's memory as flat numbers of another type (numpy has no bfloat16).

    MLX itself cannot flatten an array of 2^31 numbers or more, as DeepSeek-V3's expert layers are.
    """
    array = array.reshape(1) if array.ndim == 0 else array
    return np.asarray(array.view(kind)).reshape(-1)


def _nbytes(tensors: dict[str, mx.array]) -> int:
    return sum(array.nbytes for array in tensors.values())


def dense(layer: Layer, tensors: dict[str, mx.array]) -> mx.array:
    """A layer's unquantized weight, in the type that it (or its scales) will be written in.

    Of a layer that the source holds quantized: code x scale + bias in float32, rounded once; expert by expert, so that
    no float32 copy of the whole layer exists.
    """
    if layer.stored is None:
        return tensors["weight"]
    config, dtype = layer.stored, getattr(mx, MLX_DTYPES[layer.dtype])
    weight, scales, biases = tensors["weight"], tensors["scales"], tensors.get("biases")

    def restore(part: slice) -> mx.array:
        bias = None if biases is None else biases[part].astype(mx.float32)
        scale = scales[part].astype(mx.float32) if config.mode == "affine" else scales[part]
        exact = mx.dequantize(weight[part], scale, bias, config.group_size, config.bits, config.mode, dtype=mx.float32)
        return exact.astype(dtype)

    if weight.ndim < 3:
        return restore(slice(None))
    parts = []
    for expert in range(weight.shape[0]):
        parts.append(restore(slice(expert, expert + 1)))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def _carried(source: Source, owners: set[str]) -> dict[str, dict[str, mx.array]]:
    """Lazy tensors of modules that mlx-lm's model lacks, straight from the shards."""
    found: dict[str, dict[str, mx.array]] = {}
    files = [f for f, table in source.headers.items() if any(n.rpartition(".")[0] in owners for n in table)]
    for file in files:
        with mx.stream(reading()):
            loaded: dict[str, mx.array] = mx.load(str(source.path / file))  # type: ignore[assignment]
        for name, array in loaded.items():
            owner, _, local = name.rpartition(".")
            if owner in owners:
                found.setdefault(owner, {})[local] = array
    return found


def stream(
    source: Source, inventory: Inventory, paths: Sequence[str], allow_nonfinite: bool = False
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Yield each module's evaluated parameters, by local name, in the types that they will be written in.

    Args:
        source: a checkpoint whose weights are here.
        inventory: its layers, for the types.
        paths: the modules wanted, in the model's order (two that share a fused source tensor stand side by side there).
        allow_nonfinite: don't refuse NaN and infinite weights.

    Raises:
        MintError: weights aren't finite.
    """
    wanted = set(paths)
    dtypes = {spec.name: spec.dtype for specs in inventory.others.values() for spec in specs}
    for layer in inventory.layers:
        dtypes |= {spec.name: spec.dtype for spec in layer.extras}
        if layer.stored is None:
            dtypes[f"{layer.path}.weight"] = layer.dtype
        elif layer.stored.mode == "affine":
            dtypes |= dict.fromkeys((f"{layer.path}.scales", f"{layer.path}.biases"), layer.dtype)
    arrays: dict[str, dict[str, mx.array]] = {}
    model = open_model(source, reading())
    for name, array in tree_flatten(model.parameters()):
        owner, _, local = name.rpartition(".")
        if owner in wanted:
            arrays.setdefault(owner, {})[local] = array
    arrays |= _carried(source, wanted - arrays.keys())
    if paths:
        del model, array  # from here on `arrays` alone keeps the lazy weights

    def begin(path: str) -> dict[str, mx.array]:
        """Start to read a module."""
        tensors = arrays.pop(path)
        with mx.stream(reading()):  # the disk is read here, never inside a GPU command buffer
            for local, array in tensors.items():
                code = dtypes.get(f"{path}.{local}".lstrip("."))
                dtype = getattr(mx, MLX_DTYPES[code].replace("bool", "bool_")) if code else array.dtype
                tensors[local] = array if array.dtype == dtype else array.astype(dtype)
        mx.async_eval(tensors)
        return tensors

    room = min(AHEAD, max((_nbytes(arrays[path]) for path in paths), default=0))
    begun: deque[dict[str, mx.array]] = deque()
    left = deque(paths)
    for path in paths:
        if not begun:
            begun.append(begin(left.popleft()))
        tensors = begun.popleft()
        mx.eval(tensors)
        ahead = sum(map(_nbytes, begun))
        while left and ahead + _nbytes(arrays[left[0]]) <= room:
            begun.append(begin(left.popleft()))
            ahead += _nbytes(begun[-1])
        if not allow_nonfinite:
            check_finite(path, tensors)
        yield path, tensors
        del tensors
        mx.clear_cache()
