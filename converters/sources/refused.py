"""Formats that aren't read, by their names: why, and what would serve instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...base.files import BASE_MODEL
from .packed import BYTES, REALS, Group, Packed, Unread, smoothed
from .stated import Stated

# Methods that are read and ones that aren't, by the `quant_method` of config.json.
READ = {
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "modelopt": "ModelOpt",
    "quark": "Quark",
    "torchao": "torchao",
}
UNREAD = {
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fouroversix": "Four Over Six",
    "gguf": "GPTQModel's GGUF",
    "fp_quant": "FP-Quant",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "paroquant": "ParoQuant",
    "qqq": "QQQ",
    "quanto": "quanto",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
# Types of tensors that are no codes of weights: numbers, positions, masks.
_NO_CODES = (*REALS, "I64", "BOOL")
# The last parts of names that only one tool gives to its tensors.
_TOOLS = {
    "W_q": "HQQ",
    "bitmask": "compressed-tensors' sparse formats",
    "_data": "quanto",
    "codebooks": "AQLM",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "channel_scales": "ParoQuant",
    "s_channel": "QQQ",
    "dense_weights": "SpQR",
    "indices": "VPTQ",
}


def match(group: Group, stated: Stated) -> Packed | None:
    """Refuse a weight of a format that is known, but can't be read.

    Raises:
        Unread: it is such a weight.
    """
    if "pre_quant_scale" in group.infos:
        raise smoothed("ModelOpt", "pre_quant_scale")
    kind, scales = group.dtype(""), group.dtype("scale")
    if kind in BYTES and scales in REALS and len(group.shape("")) == 2:
        rows, shape = group.shape("")[0], group.shape("scale")
        if kind == "U8" and shape and shape[0] == 2 * rows:
            raise Unread("is int4 of ModelOpt, with two rows in a byte")
    if kind == "F64" and group.stem.endswith("weight"):
        raise Unread("is in float64, which mint-mlx does not read", "save it in bf16 or float32")
    if kind == "I32" and "scale" in group.infos:
        raise Unread(
            "is packed integers of Quark, whose order of codes its config does not tell for sure"
        )
    leaf = group.stem.rpartition(".")[2]
    rotation = _rotated_by(stated.table)
    by_autoround = leaf.startswith("spinquant_") or leaf == "hadamard_matrix"
    if by_autoround or (rotation and group.roles != {""}):
        raise Unread(
            f"was rotated by {rotation or 'AutoRound'}: its inputs are rotated when it runs, for "
            "which MLX has no place"
        )
    if leaf in _TOOLS:
        raise Unread(f"is a tensor of {_TOOLS[leaf]}, which mint-mlx does not read")
    if stated.table.get("checkpoint_format") == "marlin" or stated.table.get("is_marlin_format"):
        raise Unread("is in Marlin's order of codes, which mint-mlx does not read")
    codes = any(info.dtype not in _NO_CODES for info in group.infos.values())
    if codes and stated.method in UNREAD:
        raise Unread(f"is packed by {UNREAD[stated.method]}, which mint-mlx does not read")
    return None


def _rotated_by(table: dict[str, Any]) -> str:
    """The tool whose rotations must run with the model, and the key that says so; '' for none.

    Rotations of compressed-tensors that lie in the weights alone are undone by other weights.
    """
    transforms = table.get("transform_config")
    if transforms and not _lie_in_weights(transforms):
        return "compressed-tensors (transform_config)"
    tools = {
        "rotation_config": "AutoRound",
        "spinquant_config": "AutoRound",
        "rotation": "GPTQModel",
    }
    return next((f"{tool} ({key})" for key, tool in tools.items() if table.get(key)), "")


def _lie_in_weights(transforms: Any) -> bool:
    """Whether a transform_config applies to nothing but weights."""
    try:
        groups = (transforms.get("config_groups") or {}).values()
        uses = [use for group in groups for use in group.get("apply") or [{}]]
        return all(str(use.get("location")).startswith("weight_") for use in uses)
    except AttributeError:  # of another form than any release has
        return False


def what_instead(folder: Path) -> str:
    """What to give in place of a source that isn't read: its original, by name if its card has it.

    Args:
        folder: with the model card (README.md) or its base model (BASE_MODEL), if there is one.
    """
    base = _base_model(folder)
    if isinstance(base, str) and base and len(base) < 200 and base.isprintable():
        return f"give {base}, which it was made from"
    return "give the original in bf16"


def _base_model(folder: Path) -> Any:
    """What the card of a checkpoint says that it was made from; None where it says nothing."""
    try:
        if (folder / BASE_MODEL).is_file():
            return (folder / BASE_MODEL).read_text(encoding="utf-8")
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        data = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, yaml.YAMLError, RecursionError, IndexError, UnicodeDecodeError):
        return None
    base = data.get("base_model") if isinstance(data, dict) else None
    return base[0] if isinstance(base, list) and base else base
