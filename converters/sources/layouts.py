"""Sources that are quantized already: which are read, and the refusal of all others.

| layout | how it is read |
|---|---|
| MLX's own (affine, mxfp4, mxfp8, nvfp4) | layers stay as they are, or are dequantized one by one |
| integers (compressed-tensors, GPTQ, AWQ, AutoRound, metal, gemma) | the same: MLX has the codes |
| BitNet, MXFP4, MXFP6, MXFP8 | the same |
| FP8, NVFP4, int8, bitsandbytes, torchao | dequantized to the model's 16-bit type |
| gpt-oss, DeepSeek-V4.1, Muse | as mlx-lm's class reads them |

What a weight is follows from the tensors that it has, then from config.json. Nothing is guessed: a
layout that isn't in this table would be read as something that it is not.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...base.errors import MintError, NeedsWeights
from ...base.hf_config import stated_dtype, text_config
from ...base.quant_config import MX_MODES, QuantConfig
from ...base.safetensors_header import TensorInfo
from . import (
    awq,
    bitnet,
    bitsandbytes,
    fp8,
    gemma,
    gpt_oss,
    gptq,
    int8,
    kimi_vl,
    metal,
    microscaling,
    nvfp4,
    pack_quantized,
    refused,
    torchao,
)
from .packed import REALS, Group, Packed, Unread, group_tensors
from .restore import Stacks, restore, unpack
from .sanitize import wrap_sanitize
from .stated import Stated

Headers = Mapping[str, Mapping[str, TensorInfo]]  # tensors by file and name
# The first that knows a weight's tensors reads it (or says why it can't be read).
FORMATS = (
    refused,
    bitnet,
    gemma,
    metal,
    microscaling,
    nvfp4,
    fp8,
    pack_quantized,
    gptq,
    awq,
    bitsandbytes,
    torchao,
    int8,
)
# Model types whose class in mlx-lm reads a packed layout of its own, by tensors that only it has.
NATIVE = {
    "bitnet": r".*_proj\.weight_scale",
    "gpt_oss": r".*\.experts\.\w+_blocks",
    "deepseek_v41": r".*\.ffn\.experts\..*\.w1\.scale",
    "deepseek_v41_text": r".*\.ffn\.experts\..*\.w1\.scale",
    "muse_spark": r".*\.experts\.\w+_weight_scale",
}
# Methods whose weights may be numbers that are quantized only when the model runs.
ROUNDED_LATER = ("bitnet",)
# Files in which older tools describe the quantization, with what their config.json would say.
BESIDE = {
    "hf_quant_config.json": {"quant_method": "modelopt"},
    "quantize_config.json": {"quant_method": "gptq"},
    "quant_config.json": {"quant_method": "awq"},
    "quantization_config.json": {},
}
# What mlx-lm wants at the top of a quantization table, whatever its entries are.
DEFAULTS = {"group_size": 64, "bits": 4, "mode": "affine"}
# Of tensors that are no stacks of experts.
RANKS = {"embedding": 2, "g_idx": 1, "qbiases": 2, "qweight": 2, "qzeros": 2, "scales": 2}
# NumPy's types of the small tensors whose numbers decide how a weight is read; else they are bytes.
_NUMBERS = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "F16": "<f2"}


def _what_becomes(stored: QuantConfig | None, dtype: str) -> str:
    """What happens to weights whose codes MLX can hold in a configuration, or can't (None)."""
    if stored is None:
        return f"its weights are dequantized to {dtype} as they are read"
    if stored.global_scale:
        return f"the codes of experts stay as they are, all else is dequantized to {dtype}"
    return f"MLX holds its codes as they are ({stored})"


@dataclass(frozen=True)
class Reading:
    """What becomes of packed weights as a source is read.

    Attributes:
        exact: leave scales and biases in float32.
        dtype: of dequantized weights; the 16-bit type that the config states by default.
        keep_nvfp4: leave experts of NVFP4 packed where mlx-lm's class takes their global scale.
    """

    exact: bool = False
    dtype: mx.Dtype | None = None
    keep_nvfp4: bool = False


def read_layout(config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a source that isn't in MLX's own layout, or None.

    Raises:
        MintError: it is malformed.
    """
    if isinstance(config.get("quantization"), dict):
        return None
    layout = config.get("quantization_config") or text_config(config).get("quantization_config")
    for name, meaning in BESIDE.items():
        if not layout and (folder / name).is_file():
            try:
                layout = meaning | json.loads((folder / name).read_text("utf-8"))
            except (ValueError, TypeError):
                raise MintError(
                    f"{name} in {folder.name} is not valid: download it again"
                ) from None
    if layout is not None and not isinstance(layout, dict):
        raise MintError(
            f"quantization_config in {folder.name}'s config.json is not a table: download it again"
        )
    return layout or None


def find_packed(
    config: dict[str, Any], folder: Path, headers: Headers, keep_nvfp4: bool = False
) -> tuple[Packed, ...]:
    """The quantized weights of a source, and how each is read; none of an MLX checkpoint.

    With `keep_nvfp4` the codes of NVFP4 are said to be MLX's own, which is so of experts.

    Raises:
        MintError: a weight is packed in a way that isn't read.
    """
    if isinstance(config.get("quantization"), dict) or is_native(config, headers):
        return ()
    layout = read_layout(config, folder)
    tensors = {name: info for table in headers.values() for name, info in table.items()}
    stated = Stated(layout or {}, _value_reader(folder, headers), keep_nvfp4)
    scaled = any(name.endswith((".weight_scale", ".weight_scale_inv")) for name in tensors)
    only_numbers = not scaled and all(info.dtype in REALS for info in tensors.values())
    if only_numbers and stated.method not in ROUNDED_LATER:
        return ()

    # Each weight by its own tensors: what config.json says of several formats may overlap.
    packed = []
    for group in group_tensors(tensors).values():
        try:
            weight = _match(group, stated)
            if weight is not None and layout is None:
                raise _unstated(group)
        except Unread as reason:
            instead = reason.instead or refused.what_instead(folder)
            kind = NeedsWeights if reason.needs_weights else MintError
            raise kind(f"{group.stem} {reason}: {instead}") from None
        if weight is not None:
            packed.append(weight)
    return tuple(packed)


def _match(group: Group, stated: Stated) -> Packed | None:
    """How a weight is read; None where its tensors are numbers as they are.

    Raises:
        Unread: it is packed, but not in a way that is read.
    """
    _check_ranks(group)
    for form in FORMATS:
        weight = form.match(group, stated)
        if weight is not None:
            return weight
    kind = group.dtype("")
    if kind in REALS:
        if group.stem.endswith(".weight") and group.roles & {"scale", "scale_inv"}:
            raise Unread(f"is not packed ({kind}), but has scales beside it")
        return None
    if kind is not None and group.roles == {""} and not group.stem.endswith("weight"):
        return None  # a buffer, such as the positions
    if not stated.table or (_is_mlx(group) and stated.method not in refused.READ):
        raise _unstated(group)
    method = refused.READ.get(stated.method, repr(stated.method))
    question = "; is the checkpoint complete?" if stated.method in refused.READ else ""
    raise Unread(
        f"is packed as {_code_type(group)}, but not as mint-mlx reads {method} "
        f"(it has {', '.join(_names(group))}{question})"
    )


def _check_ranks(group: Group) -> None:
    """Refuse packed tensors that aren't matrices (or stacks of them), as those of all formats are.

    Raises:
        Unread: naming the tensor and its shape.
    """
    for role, info in group.infos.items():
        packed = role == "packed"
        packed |= role == "" and info.dtype not in REALS and group.roles != {""}
        rank = len(info.shape)
        if rank != RANKS.get(role, rank) or (packed and rank < 2):
            raise Unread(f"is packed, but {group.names[role]} is of shape {list(info.shape)}")


def _names(group: Group) -> list[str]:
    """The names of a weight's tensors within its module, in order."""
    return sorted(name.rpartition(".")[2] for name in group.names.values())


def _code_type(group: Group) -> str:
    """The safetensors type of the tensor that holds a weight's codes."""
    roles = ("", "packed", "qweight", "qdata", *sorted(group.roles))
    return next(group.infos[role].dtype for role in roles if role in group.infos)


def _unstated(group: Group) -> Unread:
    """The refusal of packed tensors in a source that doesn't say that it is quantized."""
    if _is_mlx(group):
        return Unread(
            "is packed as in MLX checkpoints, but config.json has no `quantization`",
            "download config.json again",
        )
    return Unread(f"is of type {_code_type(group)}, of which config.json says nothing")


def _is_mlx(group: Group) -> bool:
    """Whether a weight is packed as MLX packs it."""
    return group.roles == {"", "scales"} and group.dtype("") == "U32"


def is_native(config: dict[str, Any], headers: Headers) -> bool:
    """Whether the class of a model in mlx-lm reads the packed tensors itself."""
    pattern = NATIVE.get(str(config.get("model_type")))
    return pattern is not None and any(
        re.fullmatch(pattern, name) for table in headers.values() for name in table
    )


def _value_reader(folder: Path, headers: Headers) -> Callable[[str], np.ndarray]:
    """The function that reads a small tensor's numbers, by its name."""
    files = {name: file for file, table in headers.items() for name in table}

    def values(name: str) -> np.ndarray:
        info = headers[files[name]][name]
        with (folder / files[name]).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(8 + length + info.start)
            data = file.read(info.end - info.start)
        return np.frombuffer(data, dtype=_NUMBERS.get(info.dtype, "u1"))

    return values


def is_symmetric(config: dict[str, Any], folder: Path, headers: Headers) -> bool:
    """Whether the codes of a source in a foreign format lose nothing in MLX's, but for rounding."""
    return all(weight.symmetric for weight in find_packed(config, folder, headers))


def check_tensors(config: dict[str, Any], folder: Path, headers: Headers) -> None:
    """Refuse, from the headers alone, weights that would be read wrongly or not at all.

    Raises:
        MintError: naming the weight, and what to give instead.
    """
    if config.get("model_type") == "bitnet" and not is_native(config, headers):
        raise MintError(
            f"mlx-lm's class for BitNet reads packed ternary weights only, and {folder.name} has "
            "none: give the packed release of this model"
        )
    find_packed(config, folder, headers)


def describe(
    config: dict[str, Any], folder: Path, headers: Headers, keep_nvfp4: bool = False
) -> str | None:
    """A note on a source in a foreign format: what it is, and what becomes of it; else None."""
    layout = read_layout(config, folder)
    if layout is None or is_native(config, headers):
        return None
    packed = find_packed(config, folder, headers, keep_nvfp4)
    if not packed:
        return (
            "has a quantization_config, but none of its weights is packed: they are read as they "
            "are"
        )
    dtype = "float16" if stated_dtype(config) == "F16" else "bfloat16"
    counts = Counter((weight.form, weight.config) for weight in packed)
    notes = [
        f"{form}{f' ({count} weights)' if len(counts) > 1 else ''}: " + _what_becomes(stored, dtype)
        for (form, stored), count in counts.most_common()
    ]
    return f"is {'; '.join(notes)}"


def reader(
    config: dict[str, Any],
    folder: Path,
    headers: Headers,
    model_class: type,
    stacks: Stacks,
    as_read: Reading,
) -> type:
    """The model class to load a source with; prepares what its `sanitize` doesn't know.

    Args:
        config: as mlx-lm loads it; `sanitize` puts a `quantization` into it where the source has
            one, by which mlx-lm then quantizes the model.
        folder: of the checkpoint.
        headers: of its shards.
        model_class: of mlx-lm.
        stacks: what `sanitize` stacks is recorded there meanwhile.
        as_read: what becomes of packed weights.
    """
    packed = find_packed(config, folder, headers, as_read.keep_nvfp4)
    half = mx.float16 if stated_dtype(config) == "F16" else mx.bfloat16
    dtype = as_read.dtype or half
    table = _quantization(config, folder, headers)

    def prepare(
        model: Any, weights: dict[str, Any], stock: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        weights = gptq.without_zero_biases(model, weights)
        weights, codes = unpack(weights, packed, dtype)
        if config.get("model_type") == "gpt_oss":
            weights = gpt_oss.read_experts(weights)
        weights = stock(kimi_vl.split_latent(config, weights))
        stored = restore(model, weights, codes, stacks, None if as_read.exact else dtype)
        table.update({path: layer.as_mlx() for path, layer in stored.items()})
        if not as_read.keep_nvfp4:
            table.update(dict.fromkeys(nvfp4.with_global_scale(weights, dtype), False))
        if table:
            config["quantization"] = DEFAULTS | table
        return weights

    return wrap_sanitize(model_class, prepare)


def _quantization(config: dict[str, Any], folder: Path, headers: Headers) -> dict[str, Any]:
    """The table by which mlx-lm quantizes the model that it builds; empty where it makes its own.

    Where mlx-lm's own mixed recipes wrote null, MLX took what its mode has by default.
    """
    stored = config.get("quantization")
    if isinstance(stored, dict):
        return {
            path: _without_null(entry) if isinstance(entry, dict) else entry
            for path, entry in _without_null(stored).items()
        }
    if read_layout(config, folder) is None or is_native(config, headers):
        return {}
    return dict(DEFAULTS)


def _without_null(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a quantization table with MLX's defaults in place of null."""
    bits, size = MX_MODES.get(str(entry.get("mode")), (4, 64))
    defaults = {"bits": bits, "group_size": size, "mode": "affine"}
    return {
        key: defaults[key] if value is None and key in defaults else value
        for key, value in entry.items()
    }
