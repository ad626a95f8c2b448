"""The source's reference, computed and cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from helpers import Maker, Notes, llama, qwen3_moe
from safetensors import SafetensorError

from mint_mlx.eval.evaluate import evaluate
from mint_mlx.eval.settings import Settings


def test_a_model_against_itself_is_below_the_noise_floor(make: Maker, tmp_path: Path) -> None:
    source = make(qwen3_moe(2))
    (tmp_path / "t.txt").write_text("the quick brown fox " * 40)
    settings = Settings(length=32, text=str(tmp_path / "t.txt"))
    same = evaluate(str(source), settings, source=str(source))
    assert same["kl"] < same["noise_floor"]
    assert same["same_top1"] == 1
    assert same["router_changes"] == 0

    # A second run takes the reference from the cache; the figures stay.
    saved_twice = make(qwen3_moe(2), "copy")
    again = evaluate(str(saved_twice), settings, source=str(source))
    drop = {"model", "seconds", "tokens_per_second", "peak_memory"}
    assert again.keys() == same.keys()
    assert all(again[key] == same[key] for key in same.keys() - drop)


def test_a_reference_that_cannot_be_cached_costs_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    (tmp_path / "t.txt").write_text("a text of its own " * 20)
    source = str(make(llama(1)))
    settings = Settings(length=32, text=str(tmp_path / "t.txt"))
    notes = Notes()
    assert evaluate(source, settings, source=source, report=notes)["kl"] >= 0
    assert any("could not be written" in said and "No space left" in said for said in notes.said)
    with pytest.raises(OSError, match="No space left"):
        evaluate(source, settings, source=source, save=tmp_path / "reference.safetensors")


def test_the_same_text_in_another_file_has_that_files_name(make: Maker, tmp_path: Path) -> None:
    source = str(make(llama(1)))
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("A text of some words. " * 40)
        settings = Settings(text=str(tmp_path / name), length=32, windows=1)
        assert evaluate(source, settings, source=source)["text"] == name
