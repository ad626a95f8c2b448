"""A plan is a file that a person can read, edit and feed back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Maker, llama, qwen3_moe

from mint_mlx import measured, pipeline
from mint_mlx.allocate import allocate
from mint_mlx.errors import MintError
from mint_mlx.order import Job, prepare
from mint_mlx.plan import Plan, check_plan, plan_text, read_plan, write_plan
from mint_mlx.quant import QuantConfig
from mint_mlx.units import parse_budget


@pytest.fixture
def job(make: Maker) -> Job:
    return prepare(str(make(qwen3_moe(2))))


def make_plan(job: Job) -> Plan:
    return allocate(measured.get_profile(job), parse_budget("4.5bpw"), job.recipe)


@pytest.mark.parametrize("name", ["org/model", "a: b", "modèle \N{ROCKET}"])
def test_a_plan_survives_its_file(job: Job, tmp_path: Path, name: str) -> None:
    plan = replace(make_plan(job), source=name)
    write_plan(plan, job.inventory, tmp_path / "p.yaml")
    read = read_plan(tmp_path / "p.yaml")
    assert read.source == plan.source
    assert read.choice == plan.choice and read.structure == plan.structure and read.content == plan.content
    assert (read.objective, read.recipe, read.budget) == (plan.objective, plan.recipe, plan.budget)
    check_plan(read, job.inventory)


def test_one_line_a_layer_and_no_timestamp(job: Job) -> None:
    text = plan_text(make_plan(job), job.inventory)
    assert sum(line.startswith("- {layer: ") for line in text.splitlines()) == len(job.inventory.layers)
    assert "2026" not in text.replace(job.source.content, "").replace(job.source.structure, "")


def test_an_edit_is_carried_out(job: Job, tmp_path: Path) -> None:
    text = plan_text(make_plan(job), job.inventory)
    head = next(line for line in text.splitlines() if "layer: lm_head" in line)
    (tmp_path / "p.yaml").write_text(text.replace(head, "- {layer: lm_head, as: 8bit-g32}"))
    assert read_plan(tmp_path / "p.yaml").choice["lm_head"] == QuantConfig(8, 32)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a plan"),
        ("- 1", "not a plan"),
        ("mint_mlx_plan: 7\nlayers: []", "line 1.*another version"),
        ("mint_mlx_plan: 1\nlayers: 3", "line 2.*list"),
        ("mint_mlx_plan: 1\nsource: 3\nlayers: []", "line 2.*table"),
        ("mint_mlx_plan: 1\nlayers:\n- {layer: a}", "line 3.*must be"),
        ("mint_mlx_plan: 1\nlayers:\n- {layer: a, as: keep}\n- {layer: a, as: keep}", "line 4.*twice"),
        ("mint_mlx_plan: 1\nlayers:\n- {layer: a, as: 4bits}", "line 3.*4bits"),
        ("mint_mlx_plan: 1\nlayers:\n- {layer: a, as: [keep}", "not a readable plan"),
        ("mint_mlx_plan: 1\nsource: {{name}}\nlayers: []", "line 2.*a key is"),
        ("mint_mlx_plan: &x 1\nlayers: *x", "aliases"),
        ("\tmint", "not a readable plan"),
    ],
)
def test_files_that_are_no_plan_are_refused_with_their_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(MintError, match=problem):
        read_plan(tmp_path / "p.yaml")


def test_a_binary_file_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(MintError, match="not a readable plan"):
        read_plan(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("layer: lm_head", "layer: lm_foot", "does not have"),
        ("layer: model.layers.0.mlp.gate, as: keep", "layer: model.layers.0.mlp.gate, as: 8bit-g64", "multiple of 8"),
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
    from mlx_lm import convert

    folder = make(llama(2))
    result = pipeline.convert(str(folder), "4.5bpw", tmp_path / "ours", smoke=False)
    convert(
        str(folder),
        str(tmp_path / "theirs"),
        quantize=True,
        q_group_size=32,
        quant_predicate=result.plan.quant_predicate(),
    )
    ours, theirs = (json.loads((tmp_path / n / "config.json").read_text())["quantization"] for n in ("ours", "theirs"))
    assert {k: v for k, v in theirs.items() if isinstance(v, dict)} == {
        k: v for k, v in ours.items() if isinstance(v, dict)
    }


def test_the_predicate_refuses_another_model(job: Job) -> None:
    predicate = make_plan(job).quant_predicate()
    with pytest.raises(MintError, match="another model"):
        predicate("model.layers.9.mlp.up_proj", None)
