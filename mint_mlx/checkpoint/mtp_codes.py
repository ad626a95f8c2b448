"""Blocks for multi-token prediction in 8 bits, in the form that mlx-optiq and oMLX both read.

Every linear layer is quantized alike, experts are stacked under mlx-lm's names, norms stay as they
are. config.json says so twice: `mtplx_mtp_quantization` for mlx-optiq (0.7.7, which reads one
configuration for the whole head), an entry a layer in `quantization` for oMLX, which hands the head
to mlx-lm's loader. Both build the head of mlx-lm's Qwen3.5 classes; for other families they take
other forms, or none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..base.errors import MintError
from ..base.quant_config import QuantConfig
from ..base.safetensors_header import TensorInfo
from .layers import FLOATS, MLX_DTYPES, Inventory
from .layout import TensorSpec, weight_tensors

if TYPE_CHECKING:
    import mlx.core as mx

IN_8_BITS = "mtp-8bit"  # of --parts
CONFIG = QuantConfig(8, 64)
FAMILIES = ("qwen3_5", "qwen3_5_moe")
SETTINGS = "mtplx_mtp_quantization"  # of config.json
_PREFIX = "language_model."  # of the head in mlx-lm's model
_FUSED = re.compile(r"(.+\.)experts\.(gate_up|down)_proj")


@dataclass(frozen=True)
class Weight:
    """A weight of the head as mlx-lm's classes hold it.

    Attributes:
        sources: the tensors that it is made of; several are stacked.
        shape: of the unquantized weight, experts first.
        dtype: safetensors code of the sources.
        half: which half of the sources' rows it is; None for all.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    half: int | None = None


def linear_weights(mtp: Mapping[str, TensorInfo]) -> dict[str, Weight]:
    """The weights of a head that are quantized, by module path, in the source's order.

    Args:
        mtp: its tensors; those that are packed already are none.
    """
    weights: dict[str, Weight] = {}
    experts: dict[str, dict[int, str]] = {}
    for name, info in mtp.items():
        *lead, rows, columns = (0, *info.shape) if len(info.shape) < 2 else info.shape
        fused, expert = _FUSED.fullmatch(name), _expert(name)
        if info.dtype not in FLOATS or len(info.shape) < 2:
            continue
        if fused and fused[2] == "gate_up":
            for half, projection in enumerate(("gate_proj", "up_proj")):
                shape = (*lead, rows // 2, columns)
                path = f"{fused[1]}switch_mlp.{projection}"
                weights[path] = Weight((name,), shape, info.dtype, half)
        elif fused:
            path = f"{fused[1]}switch_mlp.down_proj"
            weights[path] = Weight((name,), info.shape, info.dtype)
        elif expert:
            path, number = expert
            names = experts.setdefault(path, {})
            names[number] = name
            sources = tuple(names[i] for i in sorted(names))
            weights[path] = Weight(sources, (len(names), *info.shape), info.dtype)
        elif name.endswith(".weight"):
            weights[name.removesuffix(".weight")] = Weight((name,), info.shape, info.dtype)
    return weights


def _expert(name: str) -> tuple[str, int] | None:
    """The stacked module and the number of an expert's weight in a tensor of its own, else None."""
    prefix, _, rest = name.partition(".experts.")
    number, _, local = rest.partition(".")
    if not number.isdecimal() or not local.endswith(".weight"):
        return None
    return f"{prefix}.switch_mlp.{local.removesuffix('.weight')}", int(number)


def with_coded_head(
    inventory: Inventory, mtp: Mapping[str, TensorInfo], config: dict[str, Any], half: str | None
) -> Inventory:
    """An inventory with blocks for multi-token prediction in 8 bits.

    Args:
        inventory: of the language model.
        mtp: the source's tensors of these blocks.
        config: of the source.
        half: the code of the type that 16-bit ones are written in; their own by default.

    Raises:
        MintError: no program reads 8 bits of such blocks, or MLX can't make them.
    """
    weights = linear_weights(mtp)
    coded = {name for weight in weights.values() for name in weight.sources}
    problem = _problem(mtp, weights, coded, config)
    if problem:
        instead = "--parts mtp keeps the blocks for multi-token prediction as they are"
        if any(info.dtype not in FLOATS for info in mtp.values()):
            instead = "--parts text leaves the blocks for multi-token prediction out"
        raise MintError(f"{problem}: {instead}")

    def written(dtype: str) -> str:
        return half if half and dtype != "F32" else dtype

    owned = {
        path: weight_tensors(path, weight.shape, written(weight.dtype), CONFIG)
        for path, weight in weights.items()
    }
    for name, info in mtp.items():
        if name not in coded:
            spec = TensorSpec(name, written(info.dtype), info.shape)
            owner = name.rpartition(".")[0]
            owned[owner] = (*owned.get(owner, ()), spec)
    carried = tuple(owned)
    return replace(
        inventory,
        others=inventory.others | owned,
        order=inventory.order + carried,
        carried=inventory.carried + carried,
    )


def _problem(
    mtp: Mapping[str, TensorInfo],
    weights: Mapping[str, Weight],
    coded: set[str],
    config: dict[str, Any],
) -> str:
    """Why a head can't be written in 8 bits; '' where it can."""
    if config.get("model_type") not in FAMILIES:
        return "mlx-optiq and oMLX read 8 bits of Qwen3.5's blocks only"
    for name, info in mtp.items():
        if name not in coded and info.dtype not in FLOATS:
            return f"{name} is of type {info.dtype}, not of 16 or 32 bits"
    for path, weight in weights.items():
        if weight.shape[-1] % CONFIG.group_size:
            return f"{path} has {weight.shape[-1]} columns, no multiple of {CONFIG.group_size}"
    return ""


def codes(weight: Weight, dtype: str, read: Callable[[str], mx.array]) -> dict[str, mx.array]:
    """A weight's codes, scales and biases by local name, not evaluated.

    Args:
        weight: one of `linear_weights`.
        dtype: the safetensors code of its scales.
        read: gives a tensor of the source.
    """
    import mlx.core as mx  # not at the top: words are refused before mlx is loaded

    arrays = [read(name) for name in weight.sources]
    whole = arrays[0] if len(arrays) == 1 else mx.stack(arrays)
    if weight.half is not None:
        whole = mx.split(whole, 2, axis=-2)[weight.half]
    packed = mx.quantize(
        whole.astype(getattr(mx, MLX_DTYPES[dtype])), CONFIG.group_size, CONFIG.bits
    )
    return dict(zip(("weight", "scales", "biases"), packed, strict=True))


def head_settings(inventory: Inventory, block: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a head in 8 bits, beside the quantization of the model.

    Args:
        inventory: what is written.
        block: the model's `quantization`.
    """
    if not inventory.coded:
        return {}
    entry = {"group_size": CONFIG.group_size, "bits": CONFIG.bits, "mode": CONFIG.mode}
    named = (block or entry) | {f"{_PREFIX}{path}": entry for path in sorted(inventory.coded)}
    head = entry | {"policy": "all", "prequantized": True}
    return {
        "quantization": named,
        "quantization_config": named,
        SETTINGS: head,
    }


def in_coded_head(path: str, config: dict[str, Any]) -> bool:
    """Whether an entry of `quantization` is for a head in 8 bits, which stock loaders pass over."""
    return SETTINGS in config and path.startswith(f"{_PREFIX}mtp.")
