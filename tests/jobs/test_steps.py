"""The steps one by one: they do what the whole job does, and replace only files like theirs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import Cli, Maker, Notes, Weights, edit_weights, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.jobs import convert, measurements, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.sensitivity_file import load_sensitivity
from mint_mlx.rules import efforts


def test_the_steps_do_what_the_whole_job_does(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    whole = convert.convert(folder, "5bpw", tmp_path / "whole", effort="balanced", smoke=False)
    profile, _ = steps.write_profile(folder, tmp_path / "p.json")
    sensitivity, _ = steps.write_sensitivity(folder, tmp_path / "s.npz")
    plan = steps.allocate(profile, "5bpw", sensitivity=sensitivity).plan
    assert plan.objective == "fisher-gptq"
    assert plan.choice == whole.plan.choice
    assert (plan.effort, plan.quantizer) == ("balanced", "search-gptaq")
    again = convert.convert(folder, plan=plan, out=tmp_path / "again", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert again.bytes == whole.bytes
    assert files[0] == files[1]


def test_a_sensitivity_replaces_nothing_else(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("precious")
    (tmp_path / "dir.npz").mkdir()
    np.savez(tmp_path / "other.npz", head=np.array("{}"))
    folder = str(make(llama(1)))
    for name in ("text.npz", "other.npz", "dir.npz", "nowhere/s.npz"):
        with pytest.raises(MintError):
            steps.write_sensitivity(folder, tmp_path / name)
    assert (tmp_path / "text.npz").read_text() == "precious"

    # But one of another version is replaced.
    np.savez(tmp_path / "old.npz", head=np.array('{"mint_mlx_sensitivity": 1}'))
    path, _ = steps.write_sensitivity(folder, tmp_path / "old.npz")
    assert load_sensitivity(path).tokens.size == efforts.TOKENS


def test_a_damaged_profile_is_made_anew_and_nothing_else_is_replaced(
    make: Maker, tmp_path: Path
) -> None:
    folder = str(make(llama(1)))
    file = tmp_path / "p.json"
    steps.write_profile(folder, file)
    whole = file.read_text()
    file.write_text(whole[:500])
    steps.write_profile(folder, file)
    assert file.read_text() == whole

    (tmp_path / "notes.json").write_text("{}")
    for wrong in (tmp_path / "notes.json", tmp_path, tmp_path / "no" / "p.json"):
        with pytest.raises(MintError):
            steps.write_profile(folder, wrong)
    for wrong in (file, tmp_path / "notes.json"):
        with pytest.raises(MintError, match="something else"):
            steps.allocate(file, "5bpw", wrong)

    # Another plan is replaced only when that is asked for.
    plan = tmp_path / "plan.yaml"
    steps.allocate(file, "5bpw", plan)
    with pytest.raises(MintError, match="--force"):
        steps.allocate(file, "6bpw", plan)
    steps.allocate(file, "6bpw", plan, force=True)


def test_layers_of_zeros_are_told(make: Maker) -> None:
    folder = make(llama(2))
    notes = Notes()
    measurements.get_profile(prepare(str(folder)), notes)
    assert not any("zeros" in said for said in notes.said)

    def empty(weights: Weights) -> Weights:
        late = [name for name in weights if "layers.1." in name and "proj" in name]
        return weights | {name: mx.zeros_like(weights[name]) for name in late}

    edit_weights(folder, empty)
    for _ in range(2):  # also from the cache
        notes = Notes()
        measurements.get_profile(prepare(str(folder)), notes)
        assert any(re.match(r"nothing but zeros in \S+ and 6 more of 16", n) for n in notes.said)


def test_a_profile_carries_its_recipe(make: Maker, tmp_path: Path) -> None:
    recipe = tmp_path / "strict.yaml"
    recipe.write_text("name: strict\nabout: stricter\nsqnr_floor: 30\n")
    path, profile = steps.write_profile(str(make(llama(1))), tmp_path / "p.json", str(recipe))
    plan = steps.allocate(path, "smallest").plan
    assert profile.recipe.sqnr_floor == 30
    assert plan.recipe == "strict"
    assert min(config.bits for config in plan.choice.values()) >= 5


@pytest.mark.parametrize("command", ["profile", "sensitivity"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    cli: Cli, command: str, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")
    monkeypatch.setattr(steps, "get_profile", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(steps, "get_sensitivity", lambda *_: pytest.fail("it was measured"))
    refused = cli(command, make(llama(1)), "-o", tmp_path / "closed" / "out.npz")
    assert refused.code == 1
    assert "cannot be written to: check its permissions" in refused.err
