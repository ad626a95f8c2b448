"""Sensitivities as files: nothing is lost, and a damaged one is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from helpers import TOKENS, Maker, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.fisher import measure
from mint_mlx.measure.sensitivity_file import load_sensitivity, save_sensitivity
from mint_mlx.measure.text import Text


def test_a_sensitivity_survives_its_file(make: Maker, tmp_path: Path) -> None:
    job = prepare(str(make(qwen3_moe(1))))
    measured = measure(job.source, job.inventory, Text(TOKENS, "random"))
    assert measured.metric.keys() == {0}
    assert measured.metric[0].shape == (128, 128)
    assert measured.embedding is not None
    assert measured.remaining.keys() == measured.trace.keys()
    assert min(measured.remaining.values()) < 0.999

    # Every array comes back as it was.
    file = tmp_path / "s.npz"
    save_sensitivity(measured, file)
    read = load_sensitivity(file)
    assert (read.origin, read.text.how) == (measured.origin, measured.text.how)
    assert read.remaining == measured.remaining
    same = np.testing.assert_array_equal
    same(read.tokens, TOKENS)
    same(read.metric[0], measured.metric[0])
    same(read.embedding, measured.embedding)
    for path, trace in measured.trace.items():
        same(read.trace[path], trace)
    for path, weights in measured.weights.items():
        same(read.weights[path].weight, weights.weight)
        assert (read.weights[path].expert is None) == (weights.expert is None)
        if weights.expert is not None:
            same(read.weights[path].expert, weights.expert)

    # A damaged file is refused or read, but never a traceback.
    whole = file.read_bytes()
    file.write_bytes(whole[:500])
    with pytest.raises(MintError, match="is not a sensitivity"):
        load_sensitivity(file)
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with contextlib.suppress(MintError):
            load_sensitivity(file)
