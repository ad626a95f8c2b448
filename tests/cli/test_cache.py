"""`cache` lists and drops what is kept between runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from helpers import Cli, Maker, llama

from mint_mlx.base.files import MARK, lock_folder
from mint_mlx.measure import cache


def test_the_cache_is_listed_and_dropped(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Maker
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli("cache", "--json").json["entries"] == []

    # A profile is listed, as JSON and as a table.
    folder = make(llama(1))
    cli("profile", folder, "-o", folder.parent / "p.json")
    listed = cli("cache", "--json").json
    assert [entry["kind"] for entry in listed["entries"]] == ["profiles"]
    assert listed["bytes"] > 1000
    table = cli("cache")
    assert table.code == 0
    assert "model-" in table.out

    # It is dropped by its own kind only, or with all others.
    assert cli("cache", "clear", "nonsense").code == 2
    assert cli("cache", "clear", "compare").code == 0
    assert "profiles" in str(cli("cache", "--json").json["entries"])
    assert cli("cache", "clear").code == 0
    assert cli("cache", "--json").json["entries"] == []


def test_what_interrupted_walks_left_is_listed_and_dropped(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not what another process is at."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("left", "busy"):
        (tmp_path / f"mint-mlx-walk-{name}").mkdir()
        (tmp_path / f"mint-mlx-walk-{name}" / "hidden-0.safetensors").write_bytes(bytes(1000))
        (tmp_path / f"mint-mlx-walk-{name}" / "lock").write_text(MARK)
    with lock_folder(tmp_path / "mint-mlx-walk-busy") as busy:
        assert busy is not None
        listed = cli("cache", "--work-dir", tmp_path, "--json")
        assert listed.code == 0
        (entry,) = listed.json["entries"]
        assert entry == {"name": "mint-mlx-walk-left", "kind": "walks", "bytes": 1000 + len(MARK)}
        assert cli("cache", "clear", "walks", "--work-dir", tmp_path).code == 0
    assert [path.name for path in tmp_path.glob("mint-*")] == ["mint-mlx-walk-busy"]


def test_what_a_run_uses_stays(
    cli: Cli, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kind alone: the others are deleted."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cli("profile", make(llama(1)), "-o", tmp_path / "p.json")
    replies = cache.cache_dir() / "replies" / f"x-{'0' * 16}-{'1' * 16}-{'2' * 12}.json"
    replies.parent.mkdir()
    replies.write_text("[[1]]")
    with cache.using("profiles"):
        cleared = cli("cache", "clear")
        assert (cleared.code, cleared.err.count("\n")) == (1, 1)
        assert "another run uses `profiles` of the cache, which stays" in cleared.err
        (entry,) = cli("cache", "--json").json["entries"]
        assert entry["kind"] == "profiles"
    assert cli("cache", "clear").code == 0
    assert cli("cache", "--json").json["entries"] == []
