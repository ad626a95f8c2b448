"""The file of a reference: it stands in for the source, and nothing else is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Maker, qwen3_moe

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.eval.settings import Settings
from mint_mlx.jobs import convert


def test_a_reference_is_portable(make: Maker, tmp_path: Path) -> None:
    source = make(qwen3_moe(1))
    candidate = tmp_path / "out"
    convert.convert(str(source), "6bpw", candidate, smoke=False)
    (tmp_path / "t.txt").write_text("pack my box with five dozen jugs " * 20)
    settings = Settings(length=32, text=str(tmp_path / "t.txt"))
    file = tmp_path / "r.safetensors"
    first = evaluate(str(candidate), settings, source=str(source), save=file)
    (tmp_path / "usual").touch()
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode

    # The source itself isn't needed any more.
    (source / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="its own text"):
        evaluate(str(candidate), settings, source=str(file))
    again = evaluate(str(candidate), source=str(file))
    assert again["kl"] == first["kl"] > 0
    assert again["text"] == first["text"] == "t.txt"

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MintError, match="not a reference"):
        evaluate(str(candidate), source=str(file))


@pytest.mark.parametrize(
    "name", [".", "precious.safetensors", "x.txt", "no/x.safetensors"], ids=str
)
def test_no_other_file_is_overwritten(name: str, tmp_path: Path) -> None:
    """It is refused before the model is looked for."""
    (tmp_path / "precious.safetensors").write_text("x")
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(MintError, match=r"must end in|cannot be written|something else"):
        evaluate(nowhere, source=nowhere, save=tmp_path / name)
    assert (tmp_path / "precious.safetensors").read_text() == "x"
