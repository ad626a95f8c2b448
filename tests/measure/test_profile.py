"""The profile measures the error of MLX's own quantizer, per expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, qwen3_moe

from mint_mlx.checkpoint.layers import Layer
from mint_mlx.jobs import measurements, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.measure import cache
from mint_mlx.measure import profile as profiles


def test_a_layer_is_measured_where_its_group_divides(make: Maker) -> None:
    made = measurements.get_profile(prepare(str(make(qwen3_moe(1)))))
    assert {
        c.group_size for c in made.curves["model.layers.0.mlp.switch_mlp.down_proj"].configs
    } == {32, 64}
    assert {c.group_size for c in made.curves["model.layers.0.mlp.switch_mlp.up_proj"].configs} == {
        32,
        64,
        128,
    }


def test_an_interrupted_profile_goes_on_after_the_last_layer(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(2)))
    measure_layer = profiles._measure
    measured = []

    def interrupted(layer: Layer, *more: Any) -> Any:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(layer.path)
        return measure_layer(layer, *more)

    monkeypatch.setattr(profiles, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.write_profile(folder, tmp_path / "p.json")
    (left,) = (cache.cache_dir() / "profiles").glob("*.begun-*")
    left.write_text(left.read_text() + '{"model.norm": {"cut sh')  # killed while it wrote
    first, measured[:] = set(measured), []
    monkeypatch.setattr(
        profiles,
        "_measure",
        lambda layer, *more: measured.append(layer.path) or measure_layer(layer, *more),
    )
    _, made = steps.write_profile(folder, tmp_path / "p.json")
    assert len(first) == 5
    assert not first & set(measured)
    assert first | set(measured) == made.curves.keys()
    assert not list((cache.cache_dir() / "profiles").glob("*.begun-*"))
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "other"))
    steps.write_profile(folder, tmp_path / "fresh.json")
    assert (tmp_path / "fresh.json").read_bytes() == (tmp_path / "p.json").read_bytes()
