"""A sensitivity is a file."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from helpers import TOKENS, Maker, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.sensitivity import measure
from mint_mlx.measure.sensitivity_file import load_sensitivity, save_sensitivity


def test_a_sensitivity_survives_its_file(make: Maker, tmp_path: Path) -> None:
    job = prepare(str(make(qwen3_moe(1))))
    made = measure(job.source, job.inventory, TOKENS, "random")
    assert made.metric.keys() == {0}
    assert made.metric[0].shape == (128, 128)
    assert made.embedding is not None
    save_sensitivity(made, tmp_path / "s.npz")
    read = load_sensitivity(tmp_path / "s.npz")
    np.testing.assert_array_equal(read.tokens, TOKENS)
    assert (read.origin, read.how) == (made.origin, made.how)
    for path, trace in made.trace.items():
        np.testing.assert_array_equal(read.trace[path], trace)
    for path, weights in made.weights.items():
        np.testing.assert_array_equal(read.weights[path].weight, weights.weight)
        assert (read.weights[path].part is None) == (weights.part is None)
        if weights.part is not None:
            np.testing.assert_array_equal(read.weights[path].part, weights.part)
    np.testing.assert_array_equal(read.metric[0], made.metric[0])
    assert read.left == made.left
    assert made.left.keys() == made.trace.keys()
    assert min(made.left.values()) < 0.999
    np.testing.assert_array_equal(read.embedding, made.embedding)
    whole = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(whole[:500])
    with pytest.raises(MintError, match="is not a sensitivity"):
        load_sensitivity(tmp_path / "s.npz")
    for place in np.random.default_rng(0).integers(
        0, len(whole), 60
    ):  # a damaged one is refused, never a traceback
        (tmp_path / "s.npz").write_bytes(
            whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
        )
        with contextlib.suppress(MintError):
            load_sensitivity(tmp_path / "s.npz")
