"""The cache: a profile is measured once for a source, and a cache that fails costs nothing more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, llama

from mint_mlx.base.checksum import DamagedFile
from mint_mlx.jobs import measurements
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.model import prepare
from mint_mlx.measure import cache
from mint_mlx.measure import profile as profiles
from mint_mlx.measure.curve import RateDistortion


def test_a_cache_that_cannot_be_written_stops_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "file"))
    convert(str(make(llama(1))), "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_profile_is_cached_until_the_source_changes(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    measurements.get_profile(prepare(str(folder)))
    calls = []

    def recorded(*args: Any) -> dict[str, RateDistortion]:
        calls.append(args)
        return profiles.measure_curves(*args)

    monkeypatch.setattr(measurements, "measure_curves", recorded)
    measurements.get_profile(prepare(str(folder)))
    assert not calls
    make(llama(1), seed=5)
    measurements.get_profile(prepare(str(folder)))
    assert len(calls) == 1


def test_a_sensitivity_of_other_weights_or_length_is_none(make: Maker) -> None:
    job = prepare(str(make(llama(1))))
    other = prepare(str(make(llama(1), "model2", seed=1)))
    measured = {}
    for each in (job, other):
        sensitivity = measurements.get_sensitivity(each, count=256)
        assert sensitivity is not None
        measured[each.source.name] = cache.sensitivity_path(each.source, 256)
    assert cache.cached_sensitivity(job.source, job.inventory, 256) is not None

    shutil.copy(measured["model"], cache.sensitivity_path(job.source, 512))
    with pytest.warns(DamagedFile):
        assert cache.cached_sensitivity(job.source, job.inventory, 512) is None
    shutil.copy(measured["model2"], measured["model"])
    with pytest.warns(DamagedFile):
        assert cache.cached_sensitivity(job.source, job.inventory, 256) is None
