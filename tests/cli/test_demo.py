"""`demo` runs the whole job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Cli

from mint_mlx.cli import demo
from mint_mlx.cli.output import Output
from mint_mlx.eval import score as scoring


def test_the_demo_runs_the_whole_job(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_mlx.cli.demo.WINDOWS", 4)
    ran = cli("demo", "--json")
    assert ran.code == 0
    assert "nothing is downloaded" in ran.err
    rows = {row["name"]: row for row in ran.json["rows"]}
    source, ours, uniform = rows["source (bf16)"], rows["mint-mlx"], rows["uniform 4bit-g64"]
    assert ours["bytes"] <= uniform["bytes"] < source["bytes"] / 3
    assert source["perplexity"] < ours["perplexity"] < 1.1 * source["perplexity"]


def test_an_interrupted_demo_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some windows of a checkpoint were finished."""
    forward = scoring.forward

    def interrupted(runner: Any, tokens: Any, *more: Any) -> Iterator[Any]:
        for piece in forward(runner, tokens, *more):
            if piece.rows.stop == len(tokens):
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(scoring, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo._score([("source", demo.MODEL, 1)], 1, Output(silent=True))


def test_what_make_demo_downloads_is_said_first() -> None:
    lines = (Path(__file__).parents[2] / "bootstrap.sh").read_text().splitlines()
    said = [line for line in lines if line.startswith(("say ", "if ", "for "))]
    assert "MB of packages" in said[0]
    assert "minute" in said[0]
