"""`inspect` draws equal blocks together."""

from __future__ import annotations

from pathlib import Path

from helpers import Cli, Maker, llama


def test_inspect_draws_equal_blocks_together(cli: Cli, make: Maker, tmp_path: Path) -> None:
    folder = make(llama(3))
    out = tmp_path / "out"
    override = r"layers\.[01]\..*down_proj=8bit-g32"
    command = ("convert", folder, "--uniform", "4bit-g64", "--override", override)
    assert cli(*command, "-o", out, "--no-smoke").code == 0
    inspected = cli("inspect", out)
    assert inspected.code == 0
    for group in (
        "model.layers.*.mlp.up_proj",
        "model.layers.[0-1].mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ):
        assert group in inspected.out
