"""The table of sizes."""

from __future__ import annotations

from pathlib import Path

from mint_mlx.jobs import measurements
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request, check_request
from mint_mlx.jobs.sizes import size_table


def test_sizes_after_a_sensitivity_without_a_profile(demo_model: Path) -> None:
    measurements.get_sensitivity(prepare(str(demo_model)))
    _, rows = size_table(check_request(Request(str(demo_model), "smallest", effort="balanced")))
    assert len(rows) > 3
    assert rows[0].loss is None
