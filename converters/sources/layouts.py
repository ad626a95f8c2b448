"""Sources that are quantized already: which layouts are read, and the refusal of all others by
name.

| layout | how it is read |
|---|---|
| MLX's own (affine, mxfp4, mxfp8, nvfp4) | layers stay as they are, or are dequantized one by one |
| MXFP4 (gpt-oss), MXFP8 | the same: mlx-lm maps both to MLX's modes without loss |
| int4 compressed-tensors, groups of 32 (Kimi) | the same: affine with a bias of -8 scales |
| FP8 in blocks of 128x128, or with one scale a tensor | dequantized to bf16 (fp8.py, or mlx-lm's
`sanitize`) |

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
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    if not found and (folder / "hf_quant_config.json").is_file():  # NVIDIA's exports keep it apart
        try:
            found = {"quant_method": "modelopt"} | json.loads(
                (folder / "hf_quant_config.json").read_text("utf-8")
            )
        except (ValueError, TypeError):
            raise MintError(
                f"hf_quant_config.json in {folder.name} is not valid: download it again"
            ) from None
    if found is not None and not isinstance(found, dict):
        raise MintError(
            f"quantization_config in {folder.name}'s config.json is not a table: download it again"
        )
    return found or None


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
    """The name of a layout that isn't read; None for one that is. `code` is the source of mlx-lm's
    model.
    """
    method = layout.get("quant_method")
    if method in ("mxfp4", "mxfp8"):
        return None
    if method == "fp8":
        return (
            None
            if block_fp8(layout) or _mxfp8(layout) or one_scale(layout)
            else f"FP8 {_blocks(layout)}"
        )
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
        and _size(layout) == [fp8.BLOCK, fp8.BLOCK]
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
    """Refuse 8-bit float weights that would not be dequantized, or not rightly, from the headers
    alone.

    Raises:
        MintError: naming the tensor.
    """
    tensors = {name: info for table in headers.values() for name, info in table.items()}
    eights = {name: info for name, info in tensors.items() if info.dtype in ("F8_E4M3", "F8_E5M2")}
    layout = read_layout(config, folder)
    if not eights or (layout and _mxfp8(layout)):
        return
    give = "give the original in bf16"
    for name, info in eights.items():
        scale = tensors.get(f"{name}{fp8.SCALE}")
        if layout is None or layout.get("quant_method") != "fp8":
            raise MintError(
                f"{name} is of type {info.dtype}, of which config.json says nothing: {give}"
            )
        if info.dtype != "F8_E4M3":
            raise MintError(f"{name} is of type {info.dtype}, which mint-mlx does not read: {give}")
        if scale is None:
            raise MintError(
                f"{name} is FP8, but has no scales ({name}{fp8.SCALE}): download it again, or "
                f"{give}"
            )
        if scale.dtype not in ("F32", "BF16", "F16"):
            raise MintError(
                f"{name} is FP8 with scales of type {scale.dtype}, which mint-mlx does not read: "
                f"{give}"
            )
        blocks = (*info.shape[:-2], *(-(-n // fp8.BLOCK) for n in info.shape[-2:]))
        if scale.shape not in ([(), (1,)] if one_scale(layout) else [blocks]):
            raise MintError(
                f"{name} is FP8 of shape {list(info.shape)}, but its scales are of shape "
                f"{list(scale.shape)}, which is not that of FP8 {_blocks(layout)}: {give}"
            )


def _mxfp8(layout: dict[str, Any]) -> bool:
    return layout.get("scale_fmt") == "ue8m0" and _size(layout) == [32, 32]


def _size(layout: dict[str, Any]) -> list[Any]:
    size = layout.get("weight_block_size")
    return list(size) if isinstance(size, (list, tuple)) else []


def _blocks(layout: dict[str, Any]) -> str:
    size = _size(layout)
    return f"in blocks of {'x'.join(map(str, size))}" if size else "with one scale a tensor"


def _compressed_problem(layout: dict[str, Any], code: str) -> str | None:
    form = layout.get("format")
    groups = layout.get("config_groups")
    if form != "pack-quantized" or not isinstance(groups, dict) or not groups:
        return f"compressed-tensors ({form})"
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        said = (
            weights.get("num_bits"),
            weights.get("type"),
            weights.get("group_size"),
            weights.get("symmetric"),
        )
        if said != (4, "int", 32, True) or weights.get("actorder"):
            return (
                f"compressed-tensors ({form}, {said[0]} bits of {said[1]} in groups of {said[2]}, "
                f"{'symmetric' if said[3] else 'asymmetric'})"
            )
    return (
        None
        if "weight_packed" in code
        else f"compressed-tensors ({form}; mlx-lm reads it for other families only)"
    )


def describe(
    config: dict[str, Any], folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]]
) -> str | None:
    """What happens to a source whose weights are dequantized before anything else sees them, or
    None.
    """
    layout = read_layout(config, folder)
    held = {info.dtype for table in headers.values() for info in table.values()}
    if (
        layout is None
        or layout.get("quant_method") != "fp8"
        or _mxfp8(layout)
        or "F8_E4M3" not in held
    ):
        return None
    return f"is FP8 {_blocks(layout)}: its weights are dequantized to bfloat16 as they are read"


def reader(config: dict[str, Any], folder: Path, model_class: type) -> type:
    """The model class to load a source with: a layout that its `sanitize` doesn't know is brought
    to one it does.
    """
    layout = read_layout(config, folder)
    if one_scale(layout) or (block_fp8(layout) and fp8.SCALE not in _module_source(model_class)):
        return _prepared(model_class, fp8.dequantize_all)
    if config.get("model_type") == "gpt_oss":
        return _prepared(model_class, gpt_oss.split_experts)
    return model_class


def _prepared(model_class: type, prepare: Callable[[dict[str, Any]], dict[str, Any]]) -> type:
    """A model class whose `sanitize` is preceded by a step of ours."""

    class Prepared(model_class):
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            weights = prepare(weights)
            return super().sanitize(weights) if hasattr(super(), "sanitize") else weights

    return Prepared


def _module_source(model_class: type) -> str:
    """The source text of the module that defines a model class, with those of mlx-lm's models that
    it builds on.
    """
    package = model_class.__module__.rpartition(".")[0]
    module = sys.modules[model_class.__module__]
    own = [
        m for m in vars(module).values() if inspect.ismodule(m) and m.__name__.startswith(package)
    ]
    classes = [
        c for c in vars(module).values() if inspect.isclass(c) and c.__module__.startswith(package)
    ]
    modules = {module.__name__, *(m.__name__ for m in own), *(c.__module__ for c in classes)}
    return "".join(inspect.getsource(sys.modules[name]) for name in sorted(modules))
