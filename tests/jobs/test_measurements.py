"""Measurements are made once, on as many tokens as are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Maker, Notes, llama, qwen3_moe

from mint_mlx.jobs import convert, steps
from mint_mlx.jobs.measurements import get_profile
from mint_mlx.jobs.model import Job
from mint_mlx.measure import cache, fisher, resume
from mint_mlx.measure.sensitivity import Sensitivity
from mint_mlx.measure.sensitivity_file import load_sensitivity


def test_a_sensitivity_is_measured_once(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(1)))
    first = convert.convert(folder, "5bpw", tmp_path / "a", effort="balanced", smoke=False)
    monkeypatch.setattr("mint_mlx.measure.fisher.measure", None)
    again = convert.convert(folder, "5bpw", tmp_path / "b", effort="balanced", smoke=False)
    assert first.plan.choice == again.plan.choice
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert (cache.cache_dir() / ".sensitivities.lock").is_file()  # held, so that no one clears it


def test_fewer_tokens_are_what_is_looked_at(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    out = tmp_path / "out"
    convert.convert(folder, "5bpw", out, effort="balanced", tokens=1024, smoke=False)
    sensitivity = load_sensitivity(out / "mint-sensitivity.npz")
    assert sensitivity.tokens.size == 1024
    alone, _ = steps.write_sensitivity(folder, tmp_path / "s.npz", tokens=1024)
    np.testing.assert_array_equal(load_sensitivity(alone).tokens, sensitivity.tokens)


def test_what_cannot_be_kept_is_measured_once(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = fisher.measure

    def counted(*args: Any, **more: Any) -> Sensitivity:
        measured.append(1)
        return measure(*args, **more)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fisher, "measure", counted)
    monkeypatch.setattr("mint_mlx.jobs.measurements.save_sensitivity", full)
    convert.convert(str(make(llama(1))), "5bpw", tmp_path / "out", effort="balanced", smoke=False)
    assert measured == [1]


def test_a_cache_that_cannot_be_written_costs_a_note_and_no_result(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "file" / "cache"))
    notes = Notes()
    assert get_profile(job, notes).curves
    (said,) = notes.said
    assert "could not be written to the cache" in said


def test_notes_of_a_run_that_was_killed_once_it_was_done_go_with_the_next(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = get_profile(job)
    (file,) = (tmp_path / "cache" / "profiles").iterdir()
    resume.append_curve(file, "layer", {})
    assert get_profile(job).curves.keys() == profile.curves.keys()
    assert list(file.parent.iterdir()) == [file]

    # Where the cache is only read, they stay.
    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    resume.append_curve(file, "layer", {})
    monkeypatch.setattr(resume, "remove_file", refuse)
    assert get_profile(job).curves.keys() == profile.curves.keys()
