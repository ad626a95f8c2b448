"""Small files come along with the weights, and others don't."""

from __future__ import annotations

from pathlib import Path

from helpers import Maker, llama

from mint_mlx.jobs.convert import convert

SMALL_FILES = {
    "chat_template.jinja",
    "generation_config.json",
    "added_tokens.json",
    "merges.txt",
    "LICENSE",
}


def test_small_files_and_a_card_come_along(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    for name in SMALL_FILES:
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nmetrics: [x]\n---\nhello")
    (folder / "notes.pdf").write_text("")

    convert(str(folder), "6bpw", tmp_path / "out", smoke=False)
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names >= SMALL_FILES
    assert names >= {"tokenizer.json", "tokenizer_config.json", "mint-plan.yaml"}
    assert "notes.pdf" not in names

    # The card has the source's licence and none of its other claims, and no path of this machine.
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "library_name: mlx" in card
    assert "| 6bit-" in card
    assert "metrics" not in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "mint-plan.yaml").read_text()
