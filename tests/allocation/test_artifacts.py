"""Plan, profile and sensitivity that a checkpoint holds serve the next conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_hub import FakeHub
from helpers import Cli, Maker, llama, order_for, qwen3_moe

from mint_mlx.allocation.artifacts import ARTIFACTS
from mint_mlx.base.errors import MintError
from mint_mlx.jobs import convert, steps
from mint_mlx.jobs.request import Request
from mint_mlx.measure.sensitivity_file import load_sensitivity


def test_a_sensitivity_goes_along_with_its_plan(cli: Cli, make: Maker, tmp_path: Path) -> None:
    """By the command that `allocate CHECKPOINT` prints, and by `--plan CHECKPOINT`."""
    source = str(make(qwen3_moe(2, 4)))
    result = tmp_path / "result"
    convert.convert(source, "5bpw", result, effort="balanced", tokens=1024, smoke=False)
    allocated = cli("allocate", result, "--budget", "6bpw", "-o", tmp_path / "p.yaml")
    assert allocated.code == 0
    assert f"--plan {tmp_path / 'p.yaml'} --sensitivity {result}" in allocated.out
    measured = load_sensitivity(result / "mint-sensitivity.npz")
    read = order_for(Request(source, plan=str(result), out=tmp_path / "a")).sensitivity
    assert read is not None
    assert read.tokens.size == measured.tokens.size == 1024
    assert read.origin == measured.origin

    # Neither with the plan's file alone nor to another model.
    plan = str(result / "mint-plan.yaml")
    assert order_for(Request(source, plan=plan, out=tmp_path / "b")).sensitivity is None
    other = str(make(qwen3_moe(2, 4), "other", seed=1))
    assert order_for(Request(other, plan=str(result), out=tmp_path / "c")).sensitivity is None


def test_a_checkpoint_keeps_what_made_it(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(1)))
    a, b, c = (tmp_path / name for name in "abc")
    first = convert.convert(folder, "5bpw", a, effort="balanced", smoke=False)

    # With an empty cache, the sensitivity that took hours is not measured again.
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("mint_mlx.measure.fisher.measure", None)
    again = convert.convert(folder, "5bpw", b, effort="balanced", sensitivity=a, smoke=False)
    assert first.plan.choice == again.plan.choice
    third = convert.convert(folder, plan=str(a), out=c, sensitivity=b, smoke=False)
    assert third.plan.quantizer == "search-gptaq"
    files = [(folder / "model.safetensors").read_bytes() for folder in (a, b, c)]
    assert files[0] == files[1] == files[2]
    plan = steps.allocate(str(a), "5bpw", sensitivity=str(a)).plan
    assert plan.choice == first.plan.choice


def test_a_kept_sensitivity_that_does_not_serve(make: Maker, tmp_path: Path) -> None:
    one, two = (str(make(llama(1), f"m{seed}", seed=seed)) for seed in (0, 1))
    a, b, fast = (tmp_path / name for name in ("a", "b", "fast"))
    convert.convert(one, "6bpw", a, effort="balanced", smoke=False)
    with pytest.raises(MintError, match="another model"):
        convert.convert(two, "6bpw", b, effort="balanced", sensitivity=a, smoke=False)
    with pytest.raises(MintError, match="has no effect"):
        convert.convert(one, "6bpw", b, effort="fast", sensitivity=a, smoke=False)
    convert.convert(one, "6bpw", fast, effort="fast", smoke=False)
    with pytest.raises(MintError, match="holds no mint-sensitivity"):
        convert.convert(one, "6bpw", b, effort="balanced", sensitivity=fast, smoke=False)


def test_a_repository_lends_what_it_keeps(hub: FakeHub, tmp_path: Path) -> None:
    """Each comes from the Hub as one small file; one that is missing is one sentence."""
    absent = hub.run("allocate", "org/tiny", "--budget", "5bpw")
    assert absent.returncode == 1
    assert "org/tiny holds no mint-profile.json" in absent.stderr

    # From the files of a conversion its plan is made again, without anything else.
    out = tmp_path / "out"
    result = convert.convert(str(hub.folder), "5bpw", out, effort="balanced", smoke=False)
    for name in ARTIFACTS:
        shutil.copyfile(out / name, hub.folder / name)
    hub.bytes_sent.clear()
    for more in ((), ("--sensitivity", "org/tiny")):
        plan = hub.run("allocate", "org/tiny", *more, "--budget", "5bpw", "--json")
        assert plan.returncode == 0, plan.stderr
        choice = {path: str(config) for path, config in result.plan.choice.items()}
        assert json.loads(plan.stdout)["layers"] == choice
    assert set(hub.bytes_sent) == {"mint-profile.json", "mint-sensitivity.npz"}

    # Without a network, the message does not say that they are missing.
    offline = hub.run("sweep", "org/tiny", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert offline.returncode == 1
    assert "holds no" not in offline.stderr
    assert "Traceback" not in offline.stderr
