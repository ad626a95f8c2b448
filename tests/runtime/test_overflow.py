"""Activations that float16 can't hold are found, though all runs in float32 on a CPU."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENS, Maker, Notes, edit_config, edit_weights, llama
from mlx.utils import tree_flatten

from mint_mlx.base.errors import MintError
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.eval.settings import Settings
from mint_mlx.jobs import convert as jobs
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.sensitivity import Sensitivity
from mint_mlx.measure.text import Text
from mint_mlx.runtime.overflow import largest_activation, overflow
from mint_mlx.runtime.runner import load_block, load_runner

NORM = "model.layers.0.post_attention_layernorm.weight"


@pytest.fixture
def overflowing(make: Maker) -> Path:
    """A Llama that states float16, whose MLP multiplies numbers of a thousand."""
    folder = make(llama(1), dtype=mx.float16)
    edit_config(folder, torch_dtype="float16")
    edit_weights(folder, lambda weights: weights | {NORM: weights[NORM] * 0 + 2000})
    return folder


@pytest.mark.parametrize("streamed", [False, True])
def test_the_layer_that_reads_the_largest_number_is_named(
    overflowing: Path, streamed: bool
) -> None:
    largest, path = largest_activation(load_runner(overflowing, streamed), TOKENS)
    assert largest > 65504
    assert path == "model.layers.0.mlp.down_proj"


def test_numbers_that_fit_are_no_problem(make: Maker) -> None:
    assert overflow(load_runner(make(llama(1))), TOKENS) is None


def test_an_effort_that_runs_the_model_refuses_it(overflowing: Path) -> None:
    sensitivity = Sensitivity.__new__(Sensitivity)
    object.__setattr__(sensitivity, "text", Text(TOKENS))
    job = prepare(str(overflowing))
    with pytest.raises(MintError, match=r"overflows in it.*down_proj.*--dtype bfloat16"):
        jobs._check_activations(job, sensitivity, Notes())

    # What the message offers works.
    edit_config(overflowing, torch_dtype="bfloat16")
    jobs._check_activations(prepare(str(overflowing)), sensitivity, Notes())


def test_fast_and_eval_say_so(overflowing: Path, tmp_path: Path) -> None:
    notes = Notes()
    result = jobs.convert(str(overflowing), uniform="8bit-g32", out=tmp_path / "out", report=notes)
    assert [note for note in notes.said if "overflows in it" in note and "bfloat16" in note]

    notes = Notes()
    text = tmp_path / "text.txt"
    text.write_text("A few words. " * 20)
    settings = Settings(text=str(text), length=16, windows=1)
    evaluate(str(result.path), settings, report=notes)
    assert [note for note in notes.said if "overflows in float16" in note]


def test_infinity_is_found_where_it_first_comes_up(overflowing: Path) -> None:
    runner = load_runner(overflowing)
    runner.model.layers[0].mlp.up_proj.weight *= 1e38
    largest, path = largest_activation(runner, TOKENS)
    assert np.isinf(largest)
    assert path == "model.layers.0.mlp.up_proj"


@pytest.mark.usefixtures("like_a_gpu")
def test_a_gpu_runs_float16_in_bfloat16_where_that_is_stated(overflowing: Path) -> None:
    runner = load_runner(overflowing)
    assert runner.model.layers[0].mlp.up_proj.weight.dtype == mx.float16
    asked = load_runner(overflowing, dtype="bfloat16")
    assert asked.model.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16
    edit_config(overflowing, torch_dtype="bfloat16")
    for streamed in (False, True):
        runner = load_runner(overflowing, streamed)
        load_block(runner, runner.blocks[0])
        types = {array.dtype for _, array in tree_flatten(runner.model.layers[0].parameters())}
        assert types == {mx.bfloat16}
