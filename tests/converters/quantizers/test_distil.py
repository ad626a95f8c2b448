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
from mint_mlx.jobs.refine import refine


def test_refining_keeps_codes_and_bytes_and_comes_closer(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 1024)
    uniform = tmp_path / "uniform"
    convert.convert(str(demo_model), uniform="4bit-g64", out=uniform, smoke=False)
    result = refine(str(uniform), str(demo_model), tmp_path / "refined", steps=30)
    refined = result.path
    assert result.kl_after < 0.9 * result.kl_before
    assert kl(demo_model, refined, demo_text) < 0.9 * kl(demo_model, uniform, demo_text)

    # Scales and biases have other values, in the same shapes and types; nothing else changed.
    before, after = (mx.load(str(path / "model.safetensors")) for path in (uniform, refined))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed
    assert all(name.endswith((".scales", ".biases")) for name in changed)
    forms = [{n: (a.shape, a.dtype) for n, a in arrays.items()} for arrays in (before, after)]
    assert forms[0] == forms[1]

    # The same files and one more; the card tells of both steps under the new name.
    names = [{file.name for file in path.iterdir()} for path in (uniform, refined)]
    assert names[1] - names[0] == {"mint-refined.json"}
    assert names[0] <= names[1]
    card = (refined / "README.md").read_text()
    assert 'load("refined")' in card
    assert "--model refined" in card
    assert "then refined" in card
    assert "# uniform" not in card


def test_refining_that_gains_nothing_writes_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    convert.convert(str(folder), uniform="8bit-g32", out=tmp_path / "q", smoke=False)
    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.RATE", 10.0)
    with pytest.raises(MintError, match="gained nothing"):
        refine(str(tmp_path / "q"), str(folder), tmp_path / "out", steps=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == []


def test_an_operation_without_a_gradient_is_named(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    convert.convert(folder, uniform="4bit-g32", out=tmp_path / "q", smoke=False)
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 256)
    norm = nn.RMSNorm.__call__

    def with_a_factorization(self: nn.RMSNorm, x: mx.array) -> mx.array:
        return norm(self, x) + 0 * mx.linalg.qr(x[0].astype(mx.float32), stream=mx.cpu)[1].sum()

    monkeypatch.setattr(nn.RMSNorm, "__call__", with_a_factorization)
    with pytest.raises(MintError, match=r"no gradient in MLX .*QRF"):
        refine(str(tmp_path / "q"), folder, tmp_path / "out", steps=1)
    assert not (tmp_path / "out").exists()
