"""`mint-mlx compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Cli

from mint_mlx.cli import compare as command


@pytest.mark.parametrize("where", [(), ("-o", "file/results")])
def test_a_file_in_the_place_of_the_results_is_refused_at_once(
    cli: Cli, where: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "model-compare").touch()
    refused = cli("compare", "nowhere/model", "--budget", "5bpw", *where)
    assert refused.code == 1
    assert "is a file: give a folder with -o" in refused.err


def test_a_suite_gives_models_of_one_name_a_folder_each(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []
    monkeypatch.setattr(command, "_compare", lambda *args: None)
    monkeypatch.setattr(command, "_save", lambda *args: folders.append(args[2].name) or {})
    suite = tmp_path / "s.yaml"
    models = ("org/tiny", "mirror/tiny", "org/other")
    suite.write_text("".join(f"- {{model: {model}, budgets: [5bpw]}}\n" for model in models))
    assert cli("compare", "--suite", suite).code == 0
    assert folders == ["tiny-1", "tiny-2", "other"]


def test_an_entry_of_a_suite_has_windows_of_its_own(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[int | None, int | None]] = []

    def note(*args: Any) -> None:
        scored.append((args[3].windows, args[3].length))

    monkeypatch.setattr(command, "_compare", note)
    monkeypatch.setattr(command, "_save", lambda *args: {})
    suite = tmp_path / "s.yaml"
    suite.write_text("- {model: org/a, budgets: [5bpw], windows: 7}\n- {model: org/b}\n")
    monkeypatch.chdir(tmp_path)
    assert cli("compare", "--suite", suite, "--windows", "3", "--length", "64").code == 0
    assert scored == [(7, 64), (3, 64)]
    suite.write_text("- {model: org/a, length: 1}\n")
    assert cli("compare", "--suite", suite).code != 0
