"""A plan fits its model only, in mint-mlx and as a predicate of mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Maker, llama

from mint_mlx.allocation.plan import Plan, check_plan
from mint_mlx.allocation.plan_file import plan_text, read_plan
from mint_mlx.base.errors import MintError
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import Job


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
    job: Job, plan: Plan, tmp_path: Path, old: str, new: str, problem: str
) -> None:
    text = plan_text(plan, job.inventory)
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

    # The same entry for each layer; the table's own settings may differ.
    entries = []
    for name in ("ours", "theirs"):
        table = json.loads((tmp_path / name / "config.json").read_text())["quantization"]
        entries.append({path: entry for path, entry in table.items() if isinstance(entry, dict)})
    assert entries[0] == entries[1]


def test_the_predicate_refuses_another_model(plan: Plan) -> None:
    predicate = plan.quant_predicate()
    with pytest.raises(MintError, match="another model"):
        predicate("model.layers.9.mlp.up_proj", None)
