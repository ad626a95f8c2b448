"""How much of a text is measured: a part of its windows, and more where that can't tell enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Maker, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.converters.quantizers.inputs import block_inputs, usual_weights
from mint_mlx.jobs.model import Job, prepare
from mint_mlx.measure import fisher, rounds
from mint_mlx.measure.sensitivity import Sensitivity, TokenWeights
from mint_mlx.measure.sensitivity_file import load_sensitivity, save_sensitivity
from mint_mlx.measure.text import Text

TEXT = np.random.default_rng(2).integers(0, 96, (8, 16)).astype(np.int32)
UP = "model.layers.0.mlp.switch_mlp.up_proj"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two of the eight windows are measured at first."""
    monkeypatch.setattr(rounds, "LEAST", 32)
    monkeypatch.setattr(rounds, "SHARE", 4)
    return monkeypatch


def measure(job: Job, **more: Any) -> Sensitivity:
    return rounds.measure(job.source, job.inventory, Text(TEXT, "random"), **more)


def of(job: Job, windows: slice) -> Sensitivity:
    return fisher.measure(job.source, job.inventory, Text(TEXT[windows], "random"))


def check_same(one: Sensitivity, other: Sensitivity) -> None:
    for path, trace in one.trace.items():
        np.testing.assert_array_equal(trace, other.trace[path])
    for path, weights in one.weights.items():
        np.testing.assert_array_equal(weights.weight, other.weights[path].weight)
    assert one.remaining == other.remaining


def test_a_part_of_a_text_is_enough_where_its_windows_agree(
    make: Maker, few: pytest.MonkeyPatch
) -> None:
    few.setattr(rounds, "ERROR", 100.0)
    job = prepare(str(make(qwen3_moe(1))))
    measured, part = measure(job), of(job, slice(2))
    check_same(measured, part)
    assert measured.tokens.shape == TEXT.shape
    assert measured.measured == 32
    np.testing.assert_array_equal(measured.per_weight(UP), part.per_weight(UP))


def test_more_is_measured_where_they_don_t(make: Maker, few: pytest.MonkeyPatch) -> None:
    few.setattr(rounds, "ERROR", 1e-9)
    job = prepare(str(make(qwen3_moe(1))))
    measured, first, rest = measure(job), of(job, slice(2)), of(job, slice(2, 8))
    assert measured.measured == TEXT.size
    np.testing.assert_allclose(measured.trace[UP], first.trace[UP] + rest.trace[UP])
    rows = np.concatenate([first.weights[UP].weight, rest.weights[UP].weight])
    np.testing.assert_allclose(measured.weights[UP].weight, rows, atol=1e-3 * rows.max())

    # What is a mean over tokens stays one, and what is a sum is one.
    metric = (first.metric[0] + 3 * rest.metric[0]) / 4
    np.testing.assert_allclose(measured.metric[0], metric, atol=1e-3 * np.abs(metric).max())
    assert measured.embedding is not None and first.embedding is not None
    assert np.trace(measured.embedding) > np.trace(first.embedding)


def test_a_run_that_ended_while_it_measured_more_goes_on_to_the_same_numbers(
    make: Maker, few: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few.setattr(rounds, "ERROR", 1e-9)
    few.setattr("tempfile.tempdir", str(tmp_path))
    job = prepare(str(make(llama(2))))
    whole = measure(job)
    steps: list[str] = []

    def stop(what: str, *_: int) -> None:
        steps.append(what)
        if steps.count("block 0 back") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(job, progress=stop, key="k")
    assert list(tmp_path.glob("mint-mlx-walk-k-*"))
    check_same(measure(job, key="k"), whole)
    assert not list(tmp_path.glob("mint-mlx-walk-k-*"))


@pytest.mark.parametrize(
    ("shape", "windows"),
    [((64, 256), 32), ((256, 256), 128), ((8, 256), 8), ((20, 256), 16), ((3, 5000), 2)],
)
def test_at_least_half_and_4096_tokens(shape: tuple[int, int], windows: int) -> None:
    assert rounds.first_windows(shape) == windows


def test_the_standard_error_is_that_of_a_mean_over_windows(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(1))))
    layers = {layer.path: layer.size for layer in job.inventory.layers}
    small, large = sorted(layers, key=lambda path: layers[path])[:: len(layers) - 1]
    by_window = np.array([1.0, 2, 3, 6], dtype=np.float32)
    spread = TokenWeights(np.repeat(by_window, 16)[:, None], None)
    even = TokenWeights(np.ones((64, 1), dtype=np.float32), None)
    sensitivity = replace(of(job, slice(4)), weights={small: spread, large: even})
    error = np.std(by_window, ddof=1) / np.sqrt(4) / np.mean(by_window)
    share = layers[small] / (layers[small] + layers[large])
    assert rounds.standard_error(sensitivity, job.inventory) == pytest.approx(
        error * np.sqrt(share)
    )

    # A quarter of the error takes sixteen times the windows, if the text has so many.
    sensitivity = replace(sensitivity, weights={small: spread})
    few_needed = int(np.ceil(4 * (error / rounds.ERROR) ** 2))
    assert rounds.windows_needed(sensitivity, job.inventory, 1000) == few_needed
    assert rounds.windows_needed(sensitivity, job.inventory, 7) == 7


def test_a_file_keeps_what_was_measured_of_a_text(
    make: Maker, few: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few.setattr(rounds, "ERROR", 100.0)
    job = prepare(str(make(qwen3_moe(1))))
    measured = measure(job)
    file = tmp_path / "s.npz"
    save_sensitivity(measured, file)
    read = load_sensitivity(file)
    assert (read.measured, read.tokens.size) == (32, TEXT.size)
    np.testing.assert_array_equal(read.weights[UP].weight, measured.weights[UP].weight)

    # Weights of no whole windows, or of more than there are, belong to another text.
    for count in (24, 8 * 16 + 16):
        weights = {
            path: TokenWeights(np.resize(w.weight, (count, w.weight.shape[1])), None)
            for path, w in measured.weights.items()
        }
        save_sensitivity(replace(measured, weights=weights), file)
        with pytest.raises(MintError, match="damaged"):
            load_sensitivity(file)


def test_what_was_not_measured_weighs_as_tokens_at_its_place_do(
    make: Maker, few: pytest.MonkeyPatch
) -> None:
    few.setattr(rounds, "ERROR", 100.0)
    job = prepare(str(make(qwen3_moe(1))))
    measured = measure(job)
    blocks = dict(block_inputs(job.source, job.inventory, measured, batch=4))
    for path, inputs in (("model.layers.0.self_attn.q_proj", blocks[0]), ("lm_head", blocks[None])):
        weight = np.concatenate([batch.weight for batch in inputs[path].batches])
        known = np.sqrt(measured.weights[path].weight[:, 0])
        np.testing.assert_array_equal(weight[:32], known)
        place = known.reshape(2, 16).mean(0)
        runs = (slice(1), slice(1, 3), slice(3, 7), slice(7, 15), slice(15, 16))
        usual = np.concatenate([np.full(len(place[run]), place[run].mean()) for run in runs])
        np.testing.assert_allclose(weight[32:], np.tile(usual, 6), rtol=1e-5)

    # Experts of all tokens are followed, each row with a mean over those of its place.
    rows = blocks[0][UP]
    assert sum(len(batch.weight) for batch in rows.batches) == TEXT.size * 2
    squared = measured.weights[UP]
    usual = usual_weights(
        TokenWeights(np.sqrt(squared.weight), squared.expert), measured.text.counted
    )
    assert len(set(usual.tolist())) == 5
    assert set(rows.batches[-1].weight.tolist()) == set(usual.tolist())


def test_tokens_of_prompts_that_were_not_measured_weigh_as_those_that_were() -> None:
    counted = Text(np.zeros((4, 8)), given=np.array([1, 5, 3, 1])).counted
    weight = np.arange(1, 17, dtype=np.float32)[:, None]
    usual = usual_weights(TokenWeights(weight, None), counted).reshape(4, 8)

    # Of the second window four tokens are only given; runs of places are 0, 1-2, 3-6 and 7.
    prompt = weight[8:12].mean()
    np.testing.assert_allclose(usual[2, :2], prompt)
    np.testing.assert_allclose(usual[1, :4], prompt)
    assert usual[3, 0] == weight[0]
    np.testing.assert_allclose(usual[3, 1:3], weight[1:3].mean())
    np.testing.assert_allclose(usual[2, 3:7], np.concatenate([weight[3:7], weight[12:15]]).mean())
