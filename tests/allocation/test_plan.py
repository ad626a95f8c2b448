"""A plan is a file that a person can read, edit and feed back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Maker, llama

from mint_mlx.allocation.allocate import allocate
from mint_mlx.allocation.plan import Plan, check_plan
from mint_mlx.allocation.plan_file import plan_text, read_plan
from mint_mlx.base.errors import MintError
from mint_mlx.base.units import parse_budget
from mint_mlx.jobs import convert, measurements
from mint_mlx.jobs.model import Job


def make_plan(job: Job) -> Plan:
    return allocate(
        measurements.get_profile(job),
        parse_budget("4.5bpw"),
        SearchSpace(job.inventory, job.recipe),
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("layer: lm_head", "layer: lm_foot", "does not have"),
        (
            "layer: model.layers.0.mlp.gate, as: keep",
            "layer: model.layers.0.mlp.gate, as: 8bit-g64",
            "multiple of 8",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(
    job: Job, tmp_path: Path, old: str, new: str, problem: str
) -> None:
    text = plan_text(make_plan(job), job.inventory)
    assert old in text
    (tmp_path / "p.yaml").write_text(text.replace(old, new))
    with pytest.raises(MintError, match=problem):
        check_plan(read_plan(tmp_path / "p.yaml"), job.inventory)


def test_the_predicate_plugs_into_mlx_lm(make: Maker, tmp_path: Path) -> None:
    from mlx_lm import convert as stock_convert

    folder = make(llama(2))
    result = convert.convert(str(folder), "4.5bpw", tmp_path / "ours", smoke=False)
    stock_convert(
        str(folder),
        str(tmp_path / "theirs"),
        quantize=True,
        q_group_size=32,
        quant_predicate=result.plan.quant_predicate(),
    )
    ours, theirs = (
        json.loads((tmp_path / n / "config.json").read_text())["quantization"]
        for n in ("ours", "theirs")
    )
    assert {k: v for k, v in theirs.items() if isinstance(v, dict)} == {
        k: v for k, v in ours.items() if isinstance(v, dict)
    }


def test_the_predicate_refuses_another_model(job: Job) -> None:
    predicate = make_plan(job).quant_predicate()
    with pytest.raises(MintError, match="another model"):
        predicate("model.layers.9.mlp.up_proj", None)
