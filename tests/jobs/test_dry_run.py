"""What a dry run says is what happens afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import Maker, order_for, qwen3_moe

from mint_mlx.jobs import choose, convert, dry_run, measurements
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request, check_request
from mint_mlx.jobs.sizes import size_table
from mint_mlx.measure.sensitivity import Sensitivity
from mint_mlx.measure.text import Text


def test_what_is_said_before_a_sensitivity_is_what_comes_after_it(
    demo_model: Path, tmp_path: Path
) -> None:
    """Experts' lower floor holds for a dry run too, though what errors cost isn't known yet."""
    profile = measurements.get_profile(prepare(str(demo_model)))
    traces = {layer.path: np.ones(layer.as_experts[0]) for layer in profile.inventory.layers}
    sensitivity = Sensitivity(profile.origin, Text(np.zeros((1, 1), np.int32)), traces)
    model = str(demo_model)
    for budget in ("smallest", "0.88MB"):
        order = order_for(Request(model, budget, out=tmp_path / "out", effort="balanced"))
        plan, said = dry_run.dry_run(order)
        assert said.profiled
        assert not said.settled
        assert plan.objective == "prior"
        assert said.bytes <= 880_000
        text = "\n".join(dry_run.dry_lines(order.job, plan, said))
        assert "by errors alone" in text
        assert ("(exact)" in text) == (budget == "smallest")

        # The plan that a sensitivity gives has the smallest size too, and is settled.
        chosen = choose.choose_plan(order, profile, sensitivity)
        assert budget != "smallest" or said.bytes == chosen.layout(profile.inventory).total
        fixed = order_for(Request(model, plan=chosen, out=tmp_path / "out"))
        assert dry_run.dry_run(fixed)[1].settled
        assert "Gaussian" not in str(dry_run.dry_lines(fixed.job, chosen, said))
    sizes = size_table(check_request(Request(str(demo_model), "smallest", effort="balanced")))[1]
    assert sizes[0].bytes < 880_000


def test_a_dry_run_says_what_is_spilled(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(make(qwen3_moe(2, 4)))
    needed = []

    def record(folder: Path, size: int, instead: str) -> None:
        needed.append(size)

    monkeypatch.setattr("mint_mlx.measure.fisher.check_space", record)
    more = {"effort": "balanced", "tokens": 1024, "force": True}
    request = Request(source, "5bpw", out=tmp_path / "out", **more)
    before = dry_run.dry_run(order_for(request))[1].spilled
    convert.carry_out(order_for(request), smoke=False)
    assert needed == [before]
    assert before > 0
    assert dry_run.dry_run(order_for(request))[1].spilled == 0
