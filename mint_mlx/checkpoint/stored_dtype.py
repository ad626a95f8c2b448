"""The 16-bit type of a checkpoint whose config.json says none, or another than its codes have.

mlx-lm leaves tensors as they are stored where no 16-bit type is stated. Beside others that become
bfloat16 here they would make MLX compute everything in float32, the cache of keys and values too.
A checkpoint that is quantized in MLX's format runs by its scales: `mlx_lm.convert --dtype float16`
leaves bfloat16 in config.json, and scales that are rounded to that are other weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..base.hf_config import HALVES, stated_dtype, with_stated_dtype
from ..base.safetensors_header import TensorInfo
from .layers import MLX_DTYPES

SCALES = (".scales", ".biases")
Headers = Mapping[str, Mapping[str, TensorInfo]]


def with_stored_dtype(config: dict[str, Any], headers: Headers) -> dict[str, Any]:
    """The config with the 16-bit type that most of its tensors have.

    As it is where no tensor has one, and where it states one and isn't quantized in MLX's format.

    Args:
        config: of a checkpoint.
        headers: of its shards.
    """
    stated = stated_dtype(config)
    is_mlx = isinstance(config.get("quantization"), dict)
    stored = _most(headers, SCALES) if is_mlx else None
    if stored is None and stated is None:
        stored = _most(headers, ("",))
    if stored is None or stored == stated:
        return config
    return with_stated_dtype(config, MLX_DTYPES[stored])


def _most(headers: Headers, endings: tuple[str, ...]) -> str | None:
    """The 16-bit type in which most bytes of tensors with such names are; None for none."""
    sizes: Counter[str] = Counter()
    for tensors in headers.values():
        for name, info in tensors.items():
            if info.dtype in HALVES.values() and name.endswith(endings):
                sizes[info.dtype] += info.end - info.start
    return max(sizes, key=lambda code: sizes[code], default=None)
