"""What users of `mlx_lm.convert` type is understood, or answered with what does it here."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Cli, Maker, llama

from mint_mlx.base.errors import UsageError
from mint_mlx.cli.mlx_lm_words import own_words

CASES = {
    "convert --hf-path org/x -q": "convert org/x --uniform 4bit-g64",
    "convert --model=org/x -q --q-bits 8 --q-group-size 32": "convert org/x --uniform 8bit-g32",
    "convert org/x --q-mode mxfp4 --mlx-path out": "convert org/x --uniform mxfp4 --out out",
    "convert --hf-path org/x --mlx-path=out --json": "convert org/x --json --out out",
    "convert org/x -q --budget 4.5bpw": "convert org/x --budget 4.5bpw",
    "convert org/x -d --dtype float16": "convert org/x -d --dtype float16",
    "convert org/x --trust-remote-code": "convert org/x",
    "refine org/x --model y": "refine org/x --model y",
    "": "",
}


@pytest.mark.parametrize("typed", CASES)
def test_words_of_mlx_lm_are_understood(typed: str) -> None:
    words, _ = own_words(typed.split())
    assert " ".join(words) == CASES[typed]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("convert x --quant-predicate mixed_4_6", "--budget 4.5bpw"),
        ("convert x --q-bits 4 --budget 4bpw", "--budget says how to quantize"),
        ("convert x --q-mode mxfp4 --q-bits 8", "mxfp4 has 4 bits in groups of 32"),
        ("convert x --q-mode q4", "--q-mode must be"),
        ("convert --hf-path", "lacks its value"),
    ],
)
def test_what_has_no_counterpart_is_answered_with_what_to_give(typed: str, answer: str) -> None:
    with pytest.raises(UsageError, match=answer):
        own_words(typed.split())


def test_notes_say_how_words_were_read(cli: Cli) -> None:
    ran = cli("convert", "--hf-path", "nowhere", "-q", "--trust-remote-code")
    assert ran.code == 1
    assert "read as --uniform 4bit-g64" in ran.err
    assert "--budget 4.5bpw" in ran.err
    assert "--trust-remote-code has no effect" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: nowhere does not exist")
    assert "--hf-path" not in cli("convert", "--help").out


def test_16_bits_in_another_type(cli: Cli, make: Maker, tmp_path: Path) -> None:
    """`-d` and `--dtype` as mlx-lm's users give them, and a card that says what was done."""
    out = tmp_path / "out"
    words = ("--hf-path", make(llama(1)), "--mlx-path", out, "-d", "--dtype", "float16")
    ran = cli("convert", *words, "--base-model", "org/tiny", "--no-smoke")
    assert ran.code == 0, ran.err
    assert "--dtype float16 changes" in ran.err
    card = (out / "README.md").read_text()
    assert "written in 16 bits by mint-mlx" in card
    assert "base_model: org/tiny" in card
    assert "base_model_relation" not in card
