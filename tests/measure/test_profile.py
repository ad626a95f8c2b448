"""A profile measures each layer where its groups divide, and goes on after an interruption."""

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
    profile = measurements.get_profile(prepare(str(make(qwen3_moe(1)))))
    for name, groups in (("down_proj", {32, 64}), ("up_proj", {32, 64, 128})):
        curve = profile.curves[f"model.layers.0.mlp.switch_mlp.{name}"]
        assert {config.group_size for config in curve.configs} == groups


def test_an_interrupted_profile_goes_on_after_the_last_layer(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(2)))
    measure_layer = profiles._measure
    first: list[str] = []
    rest: list[str] = []

    def interrupted(layer: Layer, *more: Any) -> Any:
        if len(first) == 5:
            raise KeyboardInterrupt
        first.append(layer.path)
        return measure_layer(layer, *more)

    def recorded(layer: Layer, *more: Any) -> Any:
        rest.append(layer.path)
        return measure_layer(layer, *more)

    monkeypatch.setattr(profiles, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.write_profile(folder, tmp_path / "p.json")

    # Killed while it wrote a line of its notes, it measures all other layers and drops the notes.
    (notes,) = (cache.cache_dir() / "profiles").glob("*.begun-*")
    notes.write_text(notes.read_text() + '{"model.norm": {"cut sh')
    monkeypatch.setattr(profiles, "_measure", recorded)
    _, profile = steps.write_profile(folder, tmp_path / "p.json")
    assert len(first) == 5
    assert not set(first) & set(rest)
    assert {*first, *rest} == profile.curves.keys()
    assert not list((cache.cache_dir() / "profiles").glob("*.begun-*"))

    # The file is that of a run from the start.
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "other"))
    steps.write_profile(folder, tmp_path / "fresh.json")
    assert (tmp_path / "fresh.json").read_bytes() == (tmp_path / "p.json").read_bytes()
