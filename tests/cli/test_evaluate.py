"""`mint-mlx eval`."""

from __future__ import annotations

from pathlib import Path

from helpers import Cli, Maker, llama

PROMISED = {
    "perplexity",
    "perplexity_se",
    "median_perplexity",
    "trimmed_perplexity",
    "tokens",
    "seconds",
    "tokens_per_second",
    "bytes",
    "bits_per_weight",
    "kl",
    "kl_se",
    "kl_median",
    "kl_p99",
    "same_top1",
    "ln_ppl_difference",
    "ln_ppl_difference_ci95",
}


def test_the_json_of_eval_has_what_is_promised(cli: Cli, make: Maker, tmp_path: Path) -> None:
    source = make(llama(1))
    (tmp_path / "t.txt").write_text("sphinx of black quartz judge my vow " * 20)
    text = ("--text", tmp_path / "t.txt", "--length", "32")
    assert cli("eval", source, "--source", source, *text, "--json").json.keys() >= PROMISED
