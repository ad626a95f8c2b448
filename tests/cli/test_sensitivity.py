"""`mint-mlx sensitivity`: what it says for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import Cli, Maker, llama


def test_a_sensitivity_is_told_as_json_and_as_a_line(cli: Cli, make: Maker, tmp_path: Path) -> None:
    model = make(llama(1))
    file = tmp_path / "s.npz"
    sensitivity = cli("sensitivity", model, "-o", file, "--tokens", "1024", "--json")
    assert sensitivity.code == 0
    data = json.loads(sensitivity.out)
    assert data.keys() == {"sensitivity", "layers", "tokens", "measured", "how"}
    assert (data["sensitivity"], data["layers"], data["tokens"]) == (str(file), 9, 1024)
    assert data["measured"] == 1024
    said = cli("sensitivity", model, "-o", file, "--tokens", "1024")
    assert f"{file}: 9 layers on 1024 tokens (sampled, seed 0)" in said.out
    assert f"--sensitivity {file}" in said.out

    # Of a longer text a part is enough.
    longer = cli("sensitivity", model, "-o", file, "--tokens", "8192")
    assert f"{file}: 9 layers on 4096 of 8192 tokens (sampled, seed 0)" in longer.out
