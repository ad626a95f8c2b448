"""The model's own text: the same each time, and resumed where it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import Maker, llama
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mint_mlx.jobs.model import prepare
from mint_mlx.measure import resume, self_text
from mint_mlx.measure.self_text import random_windows, resample, write_tokens
from mint_mlx.runtime import runner
from mint_mlx.runtime.draws import uniform_numbers
from mint_mlx.runtime.memory import RESERVE


def test_tokens_are_the_models_own_and_the_same_each_time(demo_model: Path) -> None:
    source = prepare(str(demo_model)).source
    windows = random_windows(2048, 1024, start=7, length=64)
    one, how = write_tokens(source, windows)
    two, _ = write_tokens(source, random_windows(2048, 1024, start=7, length=64))
    assert one.shape == (16, 64)
    assert (one[:, 0] == 7).all()
    assert "sampled" in how
    np.testing.assert_array_equal(one, two)
    other, _ = write_tokens(source, windows, seed=1)
    assert (one != other).mean() > 0.5

    # The model predicts them far better than noise.
    loaded = runner.load_runner(demo_model)

    def loss(tokens: np.ndarray) -> float:
        logits = loaded.model(mx.array(tokens[:, :-1]))
        return float(mx.mean(nn.losses.cross_entropy(logits, mx.array(tokens[:, 1:]))).item())

    noise = np.random.default_rng(0).integers(0, 2048, one.shape).astype(np.int32)
    assert loss(one) < 0.6 * loss(noise)


def test_text_that_was_interrupted_goes_on_after_its_last_pass(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prepare(str(demo_model)).source
    place = tmp_path / "notes" / "s.npz"
    passes = []
    windows = random_windows(2048, 256, length=64)
    whole, how = write_tokens(source, windows, streamed=True)

    def counted(*args: Any) -> np.ndarray:
        if len(passes) == stop:
            raise KeyboardInterrupt
        passes.append(None)
        return resample(*args)

    # Two passes before the interruption, the others after it.
    monkeypatch.setattr(self_text, "resample", counted)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        write_tokens(source, windows, streamed=True, resume_file=place)
    stop = -1
    again, also = write_tokens(source, windows, streamed=True, resume_file=place)
    np.testing.assert_array_equal(whole, again)
    assert also == how
    assert len(passes) == self_text.PASSES

    # The notes stay until they are cleared; damaged ones are none.
    given = np.ones(len(windows), dtype=np.int64)
    assert resume.read_tokens(place, "resampled", windows, given) is not None
    resume.clear(place)
    assert not list(place.parent.iterdir())
    resume._tokens_file(place, "sampled-256").write_bytes(b"cut short")
    assert resume.read_tokens(place, "sampled-256", windows, given) is None


def test_as_many_windows_are_sampled_at_once_as_memory_has_room_for(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prepare(str(demo_model)).source
    loaded = runner.load_runner(demo_model)
    weights = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    cache = make_prompt_cache(loaded.model)
    mx.eval(loaded.model(mx.zeros((8, 256), dtype=mx.int32), cache=cache))
    eight = sum(array.nbytes for block in cache for array in (block.keys, block.values))
    for caches, windows in ((200, 256), (1.01, 4), (0, 1)):
        room = RESERVE + weights + int(caches * eight)
        monkeypatch.setattr(self_text, "room", lambda room=room: room)
        assert self_text.at_once(source, loaded, 256) == windows

    # Weights that leave room for all windows of a text have these sampled at once.
    monkeypatch.setattr(self_text, "LENGTH", 256)
    for tokens, windows in ((16 * 256, 16), (1000 * 256, 256)):
        monkeypatch.setattr(self_text, "room", lambda: 1 << 40)
        beside = self_text.room_beside(source.config, tokens)
        monkeypatch.setattr(self_text, "room", lambda free=beside: (1 << 40) - free + weights)
        assert self_text.at_once(source, loaded, 256) == windows


def test_text_that_was_interrupted_while_sampled_goes_on_after_its_last_part(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "at_once", lambda *_: 3)
    source = prepare(str(make(llama(1)))).source
    drawn = []
    windows = random_windows(96, 160, length=16)
    whole, how = write_tokens(source, windows, streamed=False)

    def progress(what: str, done: int, total: int) -> None:
        drawn.append(done)
        if len(drawn) == 50:
            raise KeyboardInterrupt

    more = {"streamed": False, "resume_file": tmp_path / "s.npz", "progress": progress}
    with pytest.raises(KeyboardInterrupt):
        write_tokens(source, windows, **more)
    again, also = write_tokens(source, windows, **more)
    np.testing.assert_array_equal(whole, again)
    assert also == how
    assert len(drawn) == 50 + 15  # three of four parts had been noted


def test_resampled_tokens_are_the_same_streamed_or_not(demo_model: Path) -> None:
    source = prepare(str(demo_model)).source
    tokens = np.random.default_rng(0).integers(0, 2048, (4, 64)).astype(np.int32)
    whole, streamed = (
        resample(
            runner.load_runner(source.path, s), tokens, uniform_numbers("text", 3, tokens.shape)
        )
        for s in (False, True)
    )
    np.testing.assert_array_equal(whole, streamed)
    assert (whole[:, 0] == tokens[:, 0]).all()
    assert (whole[:, 1:] != tokens[:, 1:]).mean() > 0.5
