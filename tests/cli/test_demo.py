"""`demo` runs the whole job."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Cli


def test_the_demo_runs_the_whole_job(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_mlx.cli.demo.WINDOWS", 4)
    ran = cli("demo", "--json")
    assert ran.code == 0
    assert "nothing is downloaded" in ran.err
    rows = {row["name"]: row for row in ran.json["rows"]}
    source, ours, uniform = rows["source (bf16)"], rows["mint-mlx"], rows["uniform 4bit-g64"]
    assert ours["bytes"] <= uniform["bytes"] < source["bytes"] / 3
    assert source["perplexity"] < ours["perplexity"] < 1.1 * source["perplexity"]


def test_what_make_demo_downloads_is_said_first() -> None:
    lines = (Path(__file__).parents[2] / "bootstrap.sh").read_text().splitlines()
    said = [line for line in lines if line.startswith(("say ", "if ", "for "))]
    assert "MB of packages" in said[0]
    assert "minute" in said[0]
