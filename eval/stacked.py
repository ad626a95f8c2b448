"""Copies an MLX export of another program as the checkpoint that it means.

AutoRound writes the codes of each expert by itself, where stock mlx-lm stacks plain weights only,
leaves embeddings in 16 bits, which are a third of a small model, and on a CPU without bf16 leaves
float32 behind: experts are stacked, embeddings rounded to nearest, and what isn't quantized has the
source's 16-bit type, before anything is scored or counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base.errors import MintError
from ..base.hf_config import stated_dtype
from ..base.quant_config import QuantConfig
from ..checkpoint.source import Source
from ..converters.output.small_files import copy_small_files
from ..converters.quantizers import rtn


def copy_stacked(
    source: Source, export: Path, out: Path, rounded: Mapping[str, QuantConfig]
) -> None:
    """Write an export as a checkpoint of the source's layout.

    Args:
        source: the model that it was made from, whose config and tokenizer it gets.
        export: the folder that the other program wrote.
        out: the checkpoint's folder, which must not exist.
        rounded: layers to round to nearest unless the export quantizes them, by path.

    Raises:
        MintError: experts of one layer have different bits, which no MLX checkpoint can say.
    """
    weights: dict[str, mx.array] = {}
    for shard in sorted(export.glob("*.safetensors")):
        loaded: Any = mx.load(str(shard))
        weights |= loaded
    dtype = mx.float16 if stated_dtype(source.config) == "F16" else mx.bfloat16
    weights = {
        name: array.astype(dtype) if array.dtype == mx.float32 else array
        for name, array in stack_experts(weights).items()
    }

    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    block = {"mode": "affine"} | stack_entries(config.get("quantization", {}))
    for path, asked in rounded.items():
        if f"{path}.scales" not in weights:
            parts = rtn.quantize(weights.pop(f"{path}.weight"), asked)
            weights |= {f"{path}.{kind}": array for kind, array in parts.items()}
            block[path] = asked.as_mlx()
    out.mkdir(parents=True)
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "mlx"})
    written = json.dumps(dict(source.config) | {"quantization": block}, indent=1)
    (out / "config.json").write_text(written, encoding="utf-8")
    copy_small_files(source, out, "text")


def stack_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Tensors of `mlp.experts.3.up_proj`, stacked in order to those of `mlp.switch_mlp.up_proj`.

    Args:
        weights: by name; each of an expert (out, in).

    Returns:
        By name; stacked ones (experts, out, in).
    """
    stacked: dict[str, dict[int, mx.array]] = {}
    rest: dict[str, mx.array] = {}
    for name, array in weights.items():
        whole, number = _whole(name)
        if number is None:
            rest[name] = array
        else:
            stacked.setdefault(whole, {})[number] = array
    return rest | {
        name: mx.stack([parts[number] for number in sorted(parts)])
        for name, parts in stacked.items()
    }


def stack_entries(block: dict[str, Any]) -> dict[str, Any]:
    """The `quantization` of a config.json, with one entry for all experts of a layer.

    Raises:
        MintError: experts of one layer have different entries.
    """
    entries: dict[str, Any] = {}
    for path, entry in block.items():
        name, _ = _whole(path)
        if entries.setdefault(name, entry) != entry:
            raise MintError(
                f"it gives experts of {name} different bits, which no MLX checkpoint can say"
            )
    return entries


def _whole(name: str) -> tuple[str, int | None]:
    """What the name becomes once experts are stacked, and the expert's number if it is of one."""
    before, _, after = name.partition(".mlp.experts.")
    number, _, rest = after.partition(".")
    return (f"{before}.mlp.switch_mlp.{rest}", int(number)) if number.isdigit() else (name, None)
