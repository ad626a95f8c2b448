"""One module after another: read, hand over, release.

Everything that passes over a model's weights (profile, convert) goes through here, so that memory holds one layer at a
time. An evaluated array never becomes lazy again, so every pass opens the model anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from .errors import NOT_FINITE, MintError
from .layers import MLX_DTYPES, Inventory, Layer
from .load import Source, open_model


def check_finite(path: str, tensors: dict[str, mx.array]) -> None:
    """Refuse weights that hold NaN or infinity (both survive a sum).

    Raises:
        MintError: naming the tensor.
    """
    floats = {name: a for name, a in tensors.items() if mx.issubdtype(a.dtype, mx.floating)}
    sums = {name: mx.sum(a, axis=-1) if a.ndim else a for name, a in floats.items()}
    finite = {name: mx.all(mx.isfinite(s)) for name, s in sums.items()}
    for name, good in finite.items():
        if not good.item() and not mx.all(mx.isfinite(floats[name])).item():
            raise MintError(f"{path}.{name} {NOT_FINITE}")


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
        with mx.stream(mx.cpu):
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
    model = open_model(source)
    for name, array in tree_flatten(model.parameters()):
        owner, _, local = name.rpartition(".")
        if owner in wanted:
            arrays.setdefault(owner, {})[local] = array
    arrays |= _carried(source, wanted - arrays.keys())
    del model, array  # from here on `arrays` alone keeps the lazy weights
    for path in paths:
        tensors = arrays.pop(path)
        with mx.stream(mx.cpu):  # the disk is read here, never inside a GPU command buffer
            for local, array in tensors.items():
                code = dtypes.get(f"{path}.{local}".lstrip("."))
                dtype = getattr(mx, MLX_DTYPES[code].replace("bool", "bool_")) if code else array.dtype
                tensors[local] = array if array.dtype == dtype else array.astype(dtype)
            mx.eval(tensors)
        del array
        if not allow_nonfinite:
            check_finite(path, tensors)
        yield path, tensors
        del tensors
        mx.clear_cache()
