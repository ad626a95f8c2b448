"""Layouts of sources that are quantized already: which are read, and the refusal of all others.

| layout | how it is read |
|---|---|
| MLX's own (affine, mxfp4, mxfp8, nvfp4) | layers stay as they are, or are dequantized one by one |
| MXFP4 (gpt-oss), MXFP8 | the same: mlx-lm maps both to MLX's modes without loss |
| int4 compressed-tensors, groups of 32 (Kimi) | the same: affine with a bias of -8 scales |
| FP8 in blocks of 128x128, or one scale a tensor | dequantized to bf16 (fp8.py, or mlx-lm) |

Nothing is guessed: a layout that isn't in this table would be read as something that it is not.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...base.errors import MintError
from ...base.hf_config import text_config
from ...base.safetensors_header import TensorInfo
from . import fp8, gpt_oss

Step = Callable[[dict[str, Any]], dict[str, Any]]

# Names of methods that aren't read, by their `quant_method`.
NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "modelopt": "ModelOpt",
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "fbgemm_fp8": "FBGEMM FP8",
}


def read_layout(config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a source that isn't in MLX's own layout, or None.

    Raises:
        MintError: it is malformed.
    """
    if isinstance(config.get("quantization"), dict):
        return None
    layout = config.get("quantization_config") or text_config(config).get("quantization_config")

    # NVIDIA's exports describe it in a file of its own.
    separate = folder / "hf_quant_config.json"
    if not layout and separate.is_file():
        try:
            layout = {"quant_method": "modelopt"} | json.loads(separate.read_text("utf-8"))
        except (ValueError, TypeError):
            raise MintError(
                f"hf_quant_config.json in {folder.name} is not valid: download it again"
            ) from None
    if layout is not None and not isinstance(layout, dict):
        raise MintError(
            f"quantization_config in {folder.name}'s config.json is not a table: download it again"
        )
    return layout or None


def check_layout(config: dict[str, Any], folder: Path, model_class: type) -> None:
    """Refuse a quantized source whose layout isn't read.

    Raises:
        MintError: naming the layout.
    """
    layout = read_layout(config, folder)
    problem = _problem(layout, _module_source(model_class)) if layout else None
    if problem:
        raise MintError(
            f"this checkpoint is quantized with {problem}, which mint-mlx does not read: give the "
            "original in bf16"
        )


def _problem(layout: dict[str, Any], code: str) -> str | None:
    """The name of a layout that isn't read; None for one that is.

    Args:
        layout: the `quantization_config`.
        code: the source text of mlx-lm's model.
    """
    method = layout.get("quant_method")
    if method in ("mxfp4", "mxfp8"):
        return None
    if method == "fp8":
        is_read = block_fp8(layout) or _mxfp8(layout) or one_scale(layout)
        return None if is_read else f"FP8 {_blocks(layout)}"
    if method == "compressed-tensors":
        return _compressed_problem(layout, code)
    if method == "modelopt":
        settings = layout.get("quantization") or layout
        return f"ModelOpt ({settings.get('quant_algo', 'unnamed')})"
    return NAMES.get(str(method), "an unnamed method" if method is None else f"{method!r}")


def block_fp8(layout: dict[str, Any] | None) -> bool:
    """Whether a layout is FP8 with one scale for each block of 128x128."""
    return (
        layout is not None
        and layout.get("quant_method") == "fp8"
        and _block_size(layout) == [fp8.BLOCK, fp8.BLOCK]
    )


def one_scale(layout: dict[str, Any] | None) -> bool:
    """Whether a layout is FP8 with one scale for each tensor (Ministral)."""
    return (
        layout is not None
        and layout.get("quant_method") == "fp8"
        and layout.get("weight_block_size") is None
    )


def check_tensors(
    config: dict[str, Any], folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]]
) -> None:
    """Refuse, from the headers alone, 8-bit floats that would be dequantized wrongly or not at all.

    Raises:
        MintError: naming the tensor.
    """
    tensors = {name: info for table in headers.values() for name, info in table.items()}
    eights = {name: info for name, info in tensors.items() if info.dtype in ("F8_E4M3", "F8_E5M2")}
    layout = read_layout(config, folder)
    if not eights or (layout and _mxfp8(layout)):
        return

    instead = "give the original in bf16"
    for name, info in eights.items():
        if layout is None or layout.get("quant_method") != "fp8":
            raise MintError(
                f"{name} is of type {info.dtype}, of which config.json says nothing: {instead}"
            )
        if info.dtype != "F8_E4M3":
            raise MintError(
                f"{name} is of type {info.dtype}, which mint-mlx does not read: {instead}"
            )
        scale_name = f"{name}{fp8.SCALE}"
        if scale_name not in tensors:
            raise MintError(
                f"{name} is FP8, but has no scales ({scale_name}): download it again, or {instead}"
            )
        _check_scale(name, info, tensors[scale_name], layout, instead)


def _check_scale(
    name: str, info: TensorInfo, scale: TensorInfo, layout: dict[str, Any], instead: str
) -> None:
    """Refuse scales of an FP8 weight that are of another type or shape than its layout's.

    Raises:
        MintError: naming the weight, and what to give `instead`.
    """
    if scale.dtype not in ("F32", "BF16", "F16"):
        raise MintError(
            f"{name} is FP8 with scales of type {scale.dtype}, which mint-mlx does not read: "
            f"{instead}"
        )
    blocks = (*info.shape[:-2], *(-(-n // fp8.BLOCK) for n in info.shape[-2:]))
    if scale.shape not in ([(), (1,)] if one_scale(layout) else [blocks]):
        raise MintError(
            f"{name} is FP8 of shape {list(info.shape)}, but its scales are of shape "
            f"{list(scale.shape)}, which is not that of FP8 {_blocks(layout)}: {instead}"
        )


def _mxfp8(layout: dict[str, Any]) -> bool:
    """Whether a layout that says FP8 is MXFP8, with exponents as scales."""
    return layout.get("scale_fmt") == "ue8m0" and _block_size(layout) == [32, 32]


def _block_size(layout: dict[str, Any]) -> list[Any]:
    """Rows and columns that share a scale; empty where the layout states none."""
    size = layout.get("weight_block_size")
    return list(size) if isinstance(size, (list, tuple)) else []


def _blocks(layout: dict[str, Any]) -> str:
    """The scales of an FP8 layout in words."""
    size = _block_size(layout)
    return f"in blocks of {'x'.join(map(str, size))}" if size else "with one scale a tensor"


def _compressed_problem(layout: dict[str, Any], code: str) -> str | None:
    """The name of a compressed-tensors layout that isn't read; None for one that is."""
    form = layout.get("format")
    groups = layout.get("config_groups")
    if form != "pack-quantized" or not isinstance(groups, dict) or not groups:
        return f"compressed-tensors ({form})"

    # Only symmetric int4 in groups of 32 has an exact form in MLX's affine mode.
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        bits, kind, size, symmetric = (
            weights.get(key) for key in ("num_bits", "type", "group_size", "symmetric")
        )
        if (bits, kind, size, symmetric) != (4, "int", 32, True) or weights.get("actorder"):
            return (
                f"compressed-tensors ({form}, {bits} bits of {kind} in groups of {size}, "
                f"{'symmetric' if symmetric else 'asymmetric'})"
            )
    if "weight_packed" not in code:
        return f"compressed-tensors ({form}; mlx-lm reads it for other families only)"
    return None


def describe(
    config: dict[str, Any], folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]]
) -> str | None:
    """A note on a source whose weights are dequantized as they are read; None for all others."""
    layout = read_layout(config, folder)
    if layout is None or layout.get("quant_method") != "fp8" or _mxfp8(layout):
        return None
    if not any(info.dtype == "F8_E4M3" for table in headers.values() for info in table.values()):
        return None
    return f"is FP8 {_blocks(layout)}: its weights are dequantized to bfloat16 as they are read"


def reader(config: dict[str, Any], folder: Path, model_class: type) -> type:
    """The model class to load a source with.

    A layout that mlx-lm's `sanitize` doesn't know is first converted to one that it knows.
    """
    layout = read_layout(config, folder)
    steps: list[Step] = []
    if one_scale(layout) or (block_fp8(layout) and fp8.SCALE not in _module_source(model_class)):
        steps.append(fp8.dequantize_all)
    if config.get("model_type") == "gpt_oss":
        steps.append(gpt_oss.split_experts)
    return _prepared(model_class, steps) if steps else model_class


def _prepared(model_class: type, steps: list[Step]) -> type:
    """A model class whose `sanitize` is preceded by steps of ours."""

    class Prepared(model_class):
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            for step in steps:
                weights = step(weights)
            return super().sanitize(weights) if hasattr(super(), "sanitize") else weights

    return Prepared


def _module_source(model_class: type) -> str:
    """The source text of a model class's module and of the mlx-lm models that it builds on."""
    package = model_class.__module__.rpartition(".")[0]
    module = sys.modules[model_class.__module__]
    names = {module.__name__}
    for value in vars(module).values():
        if inspect.ismodule(value) and value.__name__.startswith(package):
            names.add(value.__name__)
        elif inspect.isclass(value) and value.__module__.startswith(package):
            names.add(value.__module__)
    return "".join(inspect.getsource(sys.modules[name]) for name in sorted(names))
