"""A quantization configuration: bits, group size and mode of one layer, as MLX takes them.

Everywhere (flags, plans, tables) it is written `4bit-g64` (affine), `mxfp4`, `mxfp8`, `nvfp4`, or
`keep` for a layer that stays unquantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import UsageError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
MX_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
_AFFINE = re.compile(r"(\d+)bit-g(\d+)")


@dataclass(frozen=True, order=True)
class QuantConfig:
    """How one layer is quantized.

    Attributes:
        bits: per code.
        group_size: weights that share a scale.
        mode: MLX's `affine`, `mxfp4`, `nvfp4` or `mxfp8`, or `keep` for no quantization.
        global_scale: whether each expert has a number of its own besides (of nvfp4; written
            `nvfp4-global`). Sources may hold it; mint-mlx makes none.
    """

    bits: int
    group_size: int
    mode: str = "affine"
    global_scale: bool = False

    def __str__(self) -> str:
        if self.global_scale:
            return f"{self.mode}-global"
        return f"{self.bits}bit-g{self.group_size}" if self.mode == "affine" else self.mode

    @property
    def quantized(self) -> bool:
        return self.mode != "keep"

    def divides(self, last_dim: int) -> bool:
        """Whether a layer whose rows have `last_dim` weights can take this configuration."""
        return not self.quantized or last_dim % self.group_size == 0

    def as_mlx(self) -> dict[str, int | str]:
        """The entry of a `config.json`: exactly the keys that stock mlx-lm (and Swift) accept."""
        entry: dict[str, int | str] = {"group_size": self.group_size, "bits": self.bits}
        entry["mode"] = self.mode
        return entry | {"global_scale": True} if self.global_scale else entry


KEEP = QuantConfig(16, 0, "keep")
KEYS = frozenset(("group_size", "bits", "mode"))  # of an entry of a config.json
# A global scale is the largest code times the largest scale for MLX, one for others.
NVFP4_LARGEST = 6 * 448
NVFP4_GLOBAL = QuantConfig(4, 16, "nvfp4", global_scale=True)


def affine(
    bits: Iterable[int] = AFFINE_BITS, groups: Iterable[int] = AFFINE_GROUPS
) -> tuple[QuantConfig, ...]:
    """All affine configurations of these bits and group sizes."""
    return tuple(QuantConfig(b, g) for b in bits for g in groups)


def mx_mode(name: str) -> QuantConfig:
    """The configuration of a mode of MX_MODES, each of which has one only."""
    bits, group = MX_MODES[name]
    return QuantConfig(bits, group, name)


def parse_config(text: str) -> QuantConfig:
    """Read `4bit-g64`, `mxfp4`, `nvfp4`, `mxfp8` or `keep`.

    Raises:
        UsageError: no such configuration exists in MLX.
    """
    if text == "keep":
        return KEEP
    if text in MX_MODES:
        return mx_mode(text)
    if text == str(NVFP4_GLOBAL):
        return NVFP4_GLOBAL
    match = _AFFINE.fullmatch(text)
    if match:
        config = QuantConfig(int(match[1]), int(match[2]))
        if config.bits in AFFINE_BITS and config.group_size in AFFINE_GROUPS:
            return config
    raise UsageError(
        f"{text!r} is not a quantization that MLX has: write BITSbit-gGROUP with bits of "
        f"{AFFINE_BITS} and groups of {AFFINE_GROUPS} (such as 4bit-g64), or one of "
        f"{', '.join(MX_MODES)}, or keep"
    )


def layer_entries(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of single layers in the `quantization` of a config.json, by path."""
    return {path: entry for path, entry in _block(config).items() if path not in KEYS}


def default_entry(config: dict[str, Any]) -> dict[str, Any]:
    """What the `quantization` of a config.json says of layers without an entry."""
    return {k: value for k, value in _block(config).items() if not isinstance(value, (dict, bool))}


def _block(config: dict[str, Any]) -> dict[str, Any]:
    block = config.get("quantization")
    return block if isinstance(block, dict) else {}
