"""`mint-mlx eval`."""

from __future__ import annotations

import re
from pathlib import Path

from helpers import Cli, Maker, qwen3_moe

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "eval-json.md"
ASKED_FOR = {"kl_control_tokens", "control_tokens", "kinds"}  # of `--chat` or `--kinds` alone


def test_the_json_of_eval_has_the_keys_that_the_reference_lists(
    cli: Cli, make: Maker, tmp_path: Path
) -> None:
    source = make(qwen3_moe(1))
    (tmp_path / "t.txt").write_text("sphinx of black quartz judge my vow " * 20)
    text = ("--text", tmp_path / "t.txt", "--length", "32")
    page, _, _ = PAGE.read_text().partition("## Keys of `mint-mlx check")
    heads = [line.split("|")[1] for line in page.splitlines() if line[:3] == "| `"]
    listed = {key for head in heads for key in re.findall("`(.+?)`", head)}
    assert (
        cli("eval", source, "--source", source, *text, "--json").json.keys() == listed - ASKED_FOR
    )
