"""Scales and biases of a finished checkpoint are distilled end to end."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import Maker, kl, llama

from mint_mlx.base.errors import MintError
from mint_mlx.jobs import convert
from mint_mlx.jobs.refine import refine_checkpoint


def test_refining_keeps_codes_and_bytes_and_comes_closer(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 2048)
    convert.convert(str(demo_model), uniform="4bit-g64", out=tmp_path / "uniform", smoke=False)
    path, found = refine_checkpoint(
        str(tmp_path / "uniform"), str(demo_model), tmp_path / "refined", steps=40
    )
    assert found.after < 0.9 * found.before
    assert kl(demo_model, path, demo_text) < 0.9 * kl(demo_model, tmp_path / "uniform", demo_text)
    one, two = (
        mx.load(str(tmp_path / name / "model.safetensors")) for name in ("uniform", "refined")
    )
    changed = {name for name in one if not mx.array_equal(one[name], two[name])}
    assert changed
    assert all(name.endswith((".scales", ".biases")) for name in changed)
    assert {n: (a.shape, a.dtype) for n, a in one.items()} == {
        n: (a.shape, a.dtype) for n, a in two.items()
    }
    names = [sorted(f.name for f in (tmp_path / name).iterdir()) for name in ("uniform", "refined")]
    assert set(names[1]) - set(names[0]) == {"mint-refined.json"}
    assert set(names[0]) <= set(names[1])
    card = (path / "README.md").read_text()
    assert 'load("refined")' in card
    assert "--model refined" in card
    assert "then refined" in card
    assert "# uniform" not in card


def test_refining_that_gains_nothing_writes_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    convert.convert(str(folder), uniform="8bit-g32", out=tmp_path / "made", smoke=False)
    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.RATE", 10.0)
    with pytest.raises(MintError, match="gained nothing"):
        refine_checkpoint(str(tmp_path / "made"), str(folder), tmp_path / "out", steps=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == []


def test_an_operation_without_a_gradient_is_named(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    convert.convert(folder, uniform="4bit-g32", out=tmp_path / "made", smoke=False)
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 256)
    norm = nn.RMSNorm.__call__
    stiff = lambda self, x: norm(self, x) + 0 * mx.linalg.qr(x[0], stream=mx.cpu)[1].sum()  # noqa: E731
    monkeypatch.setattr(nn.RMSNorm, "__call__", stiff)
    with pytest.raises(MintError, match=r"no gradient in MLX .*QRF"):
        refine_checkpoint(str(tmp_path / "made"), folder, tmp_path / "out", steps=1)
    assert not (tmp_path / "out").exists()
