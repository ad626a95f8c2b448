"""Predicted quality against size."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Maker, llama, qwen3_moe

from mint_mlx.allocation import sweep
from mint_mlx.allocation.sweep import Point
from mint_mlx.base.errors import MintError
from mint_mlx.jobs import convert, steps
from mint_mlx.rules.efforts import band, band_text


def test_the_knee_is_where_a_curve_bends() -> None:
    points = [Point(100 + 10 * i, 1.0, 1.0 if i == 0 else 0.05 - 0.001 * i) for i in range(8)]
    assert sweep.knee(points) == 1
    assert sweep.knee(points[:2]) == 0


def test_a_sweep_goes_from_the_smallest_to_the_largest(make: Maker, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert.convert(str(make(qwen3_moe(1))), "5bpw", out, effort="balanced", smoke=False)
    curve = sweep.sweep(out, measured=("5bpw:7.5",))
    sizes = [point.bytes for point in curve.points]
    losses = [point.loss for point in curve.points]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert curve.objective == "fisher-gptq"
    first = curve.points[0]
    assert first.band == band(first.loss)
    assert sweep.sweep_lines(curve)[1][0][2] == band_text(first.loss)
    assert sweep.sweep(out / "mint-profile.json").objective == "prior"

    # Measured figures stand beside the size that they are nearest to.
    assert any("measured 7.5" in row[3] for row in sweep.sweep_lines(curve)[1])
    near_the_fourth = sweep.sweep(out, measured=(f"{sizes[3] - 2}B:9",))
    assert "measured 9" in sweep.sweep_lines(near_the_fourth)[1][3][3]


@pytest.mark.parametrize("text", ["5bpw", "5bpw:", "smallest:3", "5bpw:-1", "x:3"])
def test_measured_points_that_are_none(make: Maker, tmp_path: Path, text: str) -> None:
    path, _ = steps.write_profile(str(make(llama(1))), tmp_path / "p.json")
    with pytest.raises(MintError):
        sweep.sweep(path, measured=(text,))
