"""A checkpoint is refined with the source that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Maker, llama

from mint_mlx.base.errors import MintError
from mint_mlx.jobs import convert
from mint_mlx.jobs.refine import refine


def test_what_cannot_be_refined(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    other = make(llama(2), "other")
    quantized = tmp_path / "quantized"
    convert.convert(str(folder), uniform="4bit-g32", out=quantized, smoke=False)
    for checkpoint, source, why in (
        (folder, folder, "no layer with scales"),
        (quantized, other, "was not made from"),
        (quantized, quantized, "is its own source"),
    ):
        with pytest.raises(MintError, match=why):
            refine(str(checkpoint), str(source), tmp_path / "out")
