"""Rounding to nearest."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.jobs.convert import convert


@pytest.mark.parametrize("experts", [False, True])  # rounded row by row, and whole
def test_nvfp4_does_not_turn_small_weights_into_zeros(
    make: Maker, tmp_path: Path, experts: bool
) -> None:
    small = make(qwen3_moe(1) if experts else llama(1))
    for file in small.glob("*.safetensors"):
        tensors = mx.load(str(file))
        tiny = {name: a * 0.01 if "down_proj" in name else a for name, a in tensors.items()}
        mx.save_safetensors(str(file), tiny, metadata={"format": "pt"})
    with pytest.raises(MintError, match=r"down_proj has weights too small.*down_proj=mxfp4"):
        convert(str(small), uniform="nvfp4", out=tmp_path / "out", smoke=False)

    # What the message offers works.
    more = {"overrides": ["down_proj=mxfp4"], "force": True}
    convert(str(small), uniform="nvfp4", out=tmp_path / "out", smoke=False, **more)
