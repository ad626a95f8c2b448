"""A plan is a file that a person can read, edit and feed back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Maker, qwen3_moe

from mint_mlx.allocation.plan import Plan, check_plan
from mint_mlx.allocation.plan_file import plan_text, read_plan, write_plan
from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import Job
from mint_mlx.jobs.result import describe, summary


@pytest.mark.parametrize("name", ["org/model", "a: b", "modèle \N{ROCKET}"])
def test_a_plan_survives_its_file(job: Job, plan: Plan, tmp_path: Path, name: str) -> None:
    plan = replace(plan, origin=replace(plan.origin, source=name))
    write_plan(plan, job.inventory, tmp_path / "p.yaml")
    read = read_plan(tmp_path / "p.yaml")
    assert read.origin.source == plan.origin.source
    assert read.choice == plan.choice
    assert read.origin.structure == plan.origin.structure
    assert read.origin.content == plan.origin.content
    assert (read.objective, read.recipe, read.budget) == (plan.objective, plan.recipe, plan.budget)
    check_plan(read, job.inventory)


def test_one_line_a_layer_and_no_timestamp(job: Job, plan: Plan) -> None:
    text = plan_text(plan, job.inventory)
    lines = [line for line in text.splitlines() if line.startswith("- {layer: ")]
    assert len(lines) == len(job.inventory.layers)
    assert "2026" not in text.replace(job.source.content, "").replace(job.source.structure, "")


def test_an_edit_is_carried_out(job: Job, plan: Plan, tmp_path: Path) -> None:
    text = plan_text(plan, job.inventory)
    head = next(line for line in text.splitlines() if "layer: lm_head" in line)
    (tmp_path / "p.yaml").write_text(text.replace(head, "- {layer: lm_head, as: 8bit-g32}"))
    assert read_plan(tmp_path / "p.yaml").choice["lm_head"] == QuantConfig(8, 32)


def test_what_was_said_of_a_plan_does_not_outlive_an_edit(make: Maker, tmp_path: Path) -> None:
    """Loss and budget are those of what was chosen; an edited plan's errors are the profile's."""
    folder = str(make(qwen3_moe(2)))
    chosen = convert.convert(folder, "4.5bpw", tmp_path / "out", smoke=False).plan
    same = read_plan(tmp_path / "out" / "mint-plan.yaml")
    assert not same.edited
    assert same.loss == pytest.approx(chosen.loss, rel=1e-5)
    assert same.errors.keys() == chosen.errors.keys()

    # One layer gets fewer bits.
    text = (tmp_path / "out" / "mint-plan.yaml").read_text()
    head = next(line for line in text.splitlines() if "layer: lm_head" in line)
    plan = tmp_path / "p.yaml"
    plan.write_text(text.replace(head, re.sub('as: "[^"]*"', 'as: "2bit-g64"', head)))
    read = read_plan(plan)
    assert read.edited
    assert read.first_budget == same.budget_bytes is not None
    assert (read.loss, read.gap, read.budget, read.budget_bytes) == (None,) * 4
    assert read.errors == {}

    # Without the hash nobody knows whether it was edited.
    unsealed = tmp_path / "u.yaml"
    lines = [line for line in text.splitlines() if not line.startswith("choice:")]
    unsealed.write_text("\n".join(lines))
    assert read_plan(unsealed).edited
    assert (read_plan(unsealed).loss, read_plan(unsealed).budget) == (None, None)

    # Carried out, it has the errors of what it says now, and no loss.
    result = convert.convert(folder, plan=plan, out=tmp_path / "edited", smoke=False)
    assert summary(result)["loss"] is None
    assert "KL" not in describe(result)
    assert result.plan.errors["lm_head"].worst > 2 * chosen.errors["lm_head"].worst
    again = read_plan(tmp_path / "edited" / "mint-plan.yaml")
    assert not again.edited
    assert again.errors.keys() == result.plan.errors.keys()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a plan"),
        ("- 1", "not a plan"),
        ("mint_mlx_plan: 7\nlayers: []", "line 1.*another version"),
        ("mint_mlx_plan: 1\nlayers: 3", "line 2.*list"),
        ("mint_mlx_plan: 1\nquantiser: gptq\nlayers: []", "line 2.*no key 'quantiser'.*quantizer"),
        ("mint_mlx_plan: 1\nlayers:\n- {layer: a, as: keep, bits: 4}", "line 3.*no key 'bits'"),
        ("mint_mlx_plan: 1\nsource: 3\nlayers: []", "line 2.*table"),
        ("mint_mlx_plan: 1\neffort: turbo\nlayers: []", "line 2.*one of fast, balanced, best"),
        ("mint_mlx_plan: 1\neffort: [fast]\nlayers: []", "line 2.*one of fast, balanced, best"),
        ("mint_mlx_plan: 1\nlayers: []\nparts: half", "line 3.*one of text, mtp"),
        ("mint_mlx_plan: 1\nlayers:\n- {layer: a}", "line 3.*must be"),
        (
            "mint_mlx_plan: 1\nlayers:\n- {layer: a, as: keep}\n- {layer: a, as: keep}",
            "line 4.*twice",
        ),
        ("mint_mlx_plan: 1\nlayers:\n- {layer: a, as: 4bits}", "line 3.*4bits"),
        ("mint_mlx_plan: 1\nlayers:\n- {layer: a, as: [keep}", "not a readable plan"),
        ("mint_mlx_plan: 1\nsource: {{name}}\nlayers: []", "line 2.*a key is"),
        ("mint_mlx_plan: &x 1\nlayers: *x", "aliases"),
        ("\tmint", "not a readable plan"),
    ],
)
def test_files_that_are_no_plan_are_refused_with_their_line(
    tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(MintError, match=problem):
        read_plan(tmp_path / "p.yaml")


def test_a_binary_file_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(MintError, match="not a readable plan"):
        read_plan(tmp_path / "p.yaml")


@pytest.mark.parametrize("figure", [".inf", ".nan", "-1.0", "9" * 400, "x", "[1]"])
def test_figures_that_cannot_be_are_none(job: Job, plan: Plan, tmp_path: Path, figure: str) -> None:
    text = plan_text(plan, job.inventory)
    for name in ("loss", "gap", "budget_bytes", "worst"):
        text = re.sub(rf"\b{name}: [\d.e-]+", f"{name}: {figure}", text)
    text += f"speed: {{tokens_per_second: {figure}, low: 1, high: 1, context: {figure}}}\n"
    (tmp_path / "plan.yaml").write_text(text)
    read = read_plan(tmp_path / "plan.yaml")
    assert (read.loss, read.gap, read.budget_bytes, read.speed) == (None,) * 4
    assert not read.errors
    assert read.choice == plan.choice
