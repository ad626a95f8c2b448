"""A checkpoint is refined with the source that it was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import Maker, Notes, llama

from mint_mlx.base.errors import MintError
from mint_mlx.jobs import convert, measurements
from mint_mlx.jobs import refine as refining
from mint_mlx.jobs.model import Job
from mint_mlx.jobs.refine import refine, tokens_needed
from mint_mlx.jobs.twin import Wish
from mint_mlx.measure.sensitivity import Sensitivity
from mint_mlx.measure.text import Text
from mint_mlx.rules.efforts import EFFORTS


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


def test_few_steps_need_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 16_384)
    assert tokens_needed(None) == tokens_needed(200) == EFFORTS["best"].tokens
    assert tokens_needed(1) == 8192
    assert 10 * 1024 * 8 / 7 <= tokens_needed(10) < 10 * 1024 * 8 / 7 + 256
    assert tokens_needed(10) % 256 == 0


def test_text_of_an_earlier_sensitivity_serves(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 16_384)

    def write(job: Job, count: int, report: object, twin: object) -> Text:
        assert twin is None
        wanted.append(count)
        return Text(np.zeros((count // 256, 256), np.int32))

    monkeypatch.setattr(refining, "get_text", write)
    assert refining._text(job, tmp_path, 10, Wish(), Notes()).tokens.size == tokens_needed(10)
    assert wanted == [tokens_needed(10)]

    # A longer one in the cache: its first windows.
    stored = Sensitivity.__new__(Sensitivity)
    tokens = np.arange(64 * 256, dtype=np.int32).reshape(64, 256)
    object.__setattr__(stored, "text", Text(tokens))
    monkeypatch.setattr(
        measurements.cache, "cached_sensitivity", lambda *a: stored if a[2] == 16384 else None
    )
    reused = refining._text(job, tmp_path, 10, Wish(), Notes()).tokens
    assert np.array_equal(reused, tokens[: tokens_needed(10) // 256])
    assert len(wanted) == 1
