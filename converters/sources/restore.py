"""Loads packed weights through a model class that knows nothing of them.

mlx-lm's `sanitize` renames, splits and stacks the tensors of a family. It gets each packed weight
dequantized (lazily, so that nothing is computed for it); where it only renamed or stacked one, the
codes take its place afterwards, stacked alike. Everything else stays dequantized, at no loss.
"""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ...base.quant_config import QuantConfig
from .packed import Codes, Packed, dequantize

# By the id of a stacked array the ids of the arrays that it was made of, along the first axis.
Stacks = Mapping[int, Sequence[int]]
# What serving programs need at run time, positions that follow from config.json, and the head that
# reinforcement learning leaves beside a model (trl's): the language model doesn't need them.
UNUSED = re.compile(
    r"(.*[._])?([kv]_cache_scale|[kvq]_(scale|global_scale|zero_point)|kv_scale|prob_scale|input_scale(_ub)?|"
    r"output_scale|input_global_scale|input_zero_point|output_zero_point|activation_scale|"
    r"input_activation_scale|(input|output|weight|[kvq]_bmm)_quantizer\._amax|"
    r"rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)|position_ids|masked_bias|"
    r"v_head\.summary\.(weight|bias))"
)


@dataclass(frozen=True)
class _Weight:
    """A packed weight on its way through `sanitize`.

    Attributes:
        codes: what may take its place.
        config: the configuration of the codes.
        dense: the dequantized weight (its id must not be given to another array).
        graph: how it was computed, where that is to be checked; '' elsewhere.
    """

    codes: Codes
    config: QuantConfig
    dense: mx.array
    graph: str


def unpack(
    weights: dict[str, mx.array], packed: Sequence[Packed], dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[int, _Weight]]:
    """Dequantize all packed weights, lazily.

    Args:
        weights: a checkpoint's tensors by name.
        packed: those of them that are packed; their tensors are left out of the result.
        dtype: of the dequantized weights.

    Returns:
        The tensors, and the codes of those that MLX can hold as they are by the id of their arrays.
    """
    consumed = {name for weight in packed for name in weight.group.names.values()}
    result = {name: array for name, array in weights.items() if name not in consumed}
    stored: dict[int, _Weight] = {}
    checked = set[str]()
    for weight in packed:
        names = weight.group.names
        if not all(name in weights for name in names.values()):
            continue
        read = weight.read({role: weights[name] for role, name in names.items()})
        if weight.config is None:
            result[weight.group.stem] = read.astype(dtype)
            continue
        dense = dequantize(read, weight.config).astype(dtype)
        result[weight.group.stem] = dense

        # One weight of each name tells what happens to all of that name.
        kind = re.sub(r"\d+", "N", weight.group.stem)
        graph = "" if kind in checked else graph_of(dense)
        checked.add(kind)
        stored[id(dense)] = _Weight(read, weight.config, dense, graph)
    return result, stored


def graph_of(array: mx.array) -> str:
    """How an array is computed, as text; nothing is evaluated.

    `sanitize` may scale an array in place, as Falcon-H1's does: its id stays, this changes.
    """
    text = io.StringIO()
    mx.export_to_dot(text, array)
    return text.getvalue()


def drop_unused(model: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors without those that only serving programs use, and without empty ones."""
    parameters = {name for name, _ in tree_flatten(model.parameters())}
    return {
        name: array
        for name, array in weights.items()
        if name in parameters or not (array.size == 0 or UNUSED.fullmatch(name))
    }


def restore(
    model: Any,
    weights: dict[str, mx.array],
    stored: Mapping[int, _Weight],
    stacks: Stacks,
    dtype: mx.Dtype | None,
) -> dict[str, QuantConfig]:
    """Put codes back in place of dequantized weights that were renamed or stacked only.

    Args:
        model: of mlx-lm, not quantized yet.
        weights: its parameters as `sanitize` returned them; changed.
        stored: from `unpack`.
        stacks: what was stacked meanwhile.
        dtype: 16-bit type of scales and biases; None leaves them in float32, as exact as they are.

    Returns:
        The configurations of the layers that hold codes now, by path.
    """
    # Of each name only one weight was looked at: where one was scaled in place, all may have been.
    if any(w.graph and w.graph != graph_of(w.dense) for w in stored.values()):
        return {}

    modules = dict(model.named_modules())
    configs: dict[str, QuantConfig] = {}
    for name in list(weights):
        path = name.removesuffix(".weight")
        if path == name or not hasattr(modules.get(path), "to_quantized"):
            continue
        ids = stacks.get(id(weights[name]), [id(weights[name])])
        experts = [stored[i] for i in ids if i in stored]
        if not experts or len(experts) != len(ids) or not _alike(experts):
            continue
        if experts[0].config.global_scale and not _takes_global_scale(modules[path]):
            continue

        stacked = id(weights[name]) in stacks
        tensors = {
            "weight": _joined([w.codes.weight for w in experts], stacked),
            "scales": _joined([w.codes.scales for w in experts], stacked),
        }
        biases = [w.codes.biases for w in experts if w.codes.biases is not None]
        if biases:
            tensors |= rounded(tensors["scales"], _joined(biases, stacked), dtype)
        wholes = [w.codes.global_scale for w in experts if w.codes.global_scale is not None]
        if wholes:
            count = tensors["weight"].shape[0]
            tensors["global_scale"] = mx.broadcast_to(_joined(wholes, stacked), (count,))
        configs[path] = experts[0].config
        weights.update({f"{path}.{local}": array for local, array in tensors.items()})
    return configs


def _takes_global_scale(module: Any) -> bool:
    """Whether a layer's quantized class holds a number for each expert (SwitchLinear's does)."""
    return "global_scale" in inspect.signature(module.to_quantized).parameters


def _alike(experts: Sequence[_Weight]) -> bool:
    """Whether the codes of experts can be stacked."""
    kinds = {(w.config, w.codes.scales.shape, w.codes.weight.shape) for w in experts}
    return len(kinds) == 1


def _joined(arrays: list[mx.array], stacked: bool) -> mx.array:
    return mx.stack(arrays) if stacked else arrays[0]


def rounded(scales: mx.array, biases: mx.array, dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """A layer's scales and biases, by those names, in a 16-bit type (None: as they are).

    A bias is a multiple of its scale. It follows the rounded scale, so that the code that stands
    for zero stays near zero.
    """
    if dtype is None:
        return {"scales": scales, "biases": biases}
    small = scales.astype(dtype)
    if scales.dtype == mx.float32:
        biases = biases * mx.where(scales == 0, 1, small.astype(mx.float32) / scales)
    return {"scales": small, "biases": biases.astype(dtype)}
