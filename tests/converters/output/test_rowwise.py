"""Layers that are quantized row by row have the bytes of layers that are quantized whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Maker, qwen3_moe, spoil_weight

from mint_mlx.base.errors import MintError
from mint_mlx.converters.output import rowwise, write_layers
from mint_mlx.jobs.convert import convert


@pytest.mark.parametrize("config", ["4bit-g64", "mxfp4"])
def test_the_bytes_are_those_of_layers_that_are_read_whole(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    folder = str(make(qwen3_moe(1)))
    pieces = rowwise.quantized_pieces
    counts: list[int] = []

    def counted(*args: object, **more: object) -> object:
        cut = list(pieces(*args, **more))  # type: ignore[arg-type]
        counts.append(len(cut))
        return iter(cut)

    # A few rows at a time, and no layer that can be cut at all.
    monkeypatch.setattr(rowwise, "CHUNK", 1 << 10)
    monkeypatch.setattr(write_layers.rowwise, "quantized_pieces", counted)
    convert(folder, uniform=config, out=tmp_path / "rows", smoke=False)
    assert max(counts) > 4
    monkeypatch.setattr(write_layers.rowwise, "is_possible", lambda *_: False)
    convert(folder, uniform=config, out=tmp_path / "whole", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("rows", "whole")]
    assert files[0] == files[1]


def test_a_row_that_is_not_finite_is_refused_unless_allowed(make: Maker, tmp_path: Path) -> None:
    folder = make(qwen3_moe(1))
    spoil_weight(folder, "model.layers.0.self_attn.o_proj.weight", float("inf"))
    with pytest.raises(MintError, match=r"o_proj\.weight holds NaN or infinite"):
        convert(str(folder), uniform="4bit-g64", out=tmp_path / "out", smoke=False)
    assert not (tmp_path / "out").exists()
