"""`refine` and `sweep` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Cli


def test_refine_and_sweep_on_the_command_line(
    cli: Cli, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 2048)
    result, out = tmp_path / "result", tmp_path / "out"
    assert cli("convert", demo_model, "--budget", "4bpw", "-o", result, "--no-smoke").code == 0
    refine = ("refine", result, "--source", demo_model, "-o", out)
    refined = cli(*refine, "--steps", "4")
    assert refined.code == 0
    assert "KL from the source" in refined.out
    assert f"mlx_lm.generate --model {out} --prompt" in refined.out.splitlines()[-1]
    refused = cli(*refine)
    assert refused.code == 1
    assert "exists already" in refused.err
    assert cli("sweep", out, "--plot", tmp_path / "s.txt").code == 1
    assert cli("sweep", out).code == 0
