"""The scripts of eval/bench: they start as files, and results.md is what results.json says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import llama

from mint_mlx.eval.bench import bench, make_model
from mint_mlx.jobs.model import prepare


@pytest.mark.parametrize("script", ["bench", "levels", "make_model", "seeded_text"])
def test_the_scripts_start(script: str) -> None:
    command = [sys.executable, str(bench.FOLDER / f"{script}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {script}.py")


def test_the_report_is_that_of_the_results() -> None:
    results = json.loads((bench.FOLDER / "results.json").read_text(encoding="utf-8"))
    assert bench.report(results) == (bench.FOLDER / "results.md").read_text(encoding="utf-8")


def test_a_model_is_written_as_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small Llama in place of a released model, in several shards."""
    monkeypatch.setitem(make_model.SHAPES, "small", (lambda layers: llama(layers), 1))
    monkeypatch.setattr(make_model, "SHARD", 60_000)
    monkeypatch.setattr(make_model, "POOL", 1 << 12)
    total = make_model.write("small", 1, tmp_path / "model")

    job = prepare(str(tmp_path / "model"))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert total == 2 * job.inventory.parameters  # bf16
