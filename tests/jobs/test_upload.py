"""A finished checkpoint is uploaded with its card, which names the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Cli, Maker, llama

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.base.folders import is_checkpoint
from mint_mlx.converters.output import publish
from mint_mlx.jobs import upload as module
from mint_mlx.jobs.upload import find_finished, upload

CARD = "# model\n\n- made with: x\n\n```bash\nmlx_lm.chat --model model\n```\nMy own words.\n"


@pytest.fixture
def finished(make: Maker) -> Path:
    """A folder that passes for a refined checkpoint of ours."""
    folder = make(llama(1))
    facts = {"source": "org/model", "kl_before": 1.0, "kl_after": 0.5}
    (folder / "mint-refined.json").write_text(json.dumps(facts))
    (folder / "README.md").write_text(CARD)
    assert is_checkpoint(folder)
    return folder


def test_the_card_is_kept_and_names_the_repository(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    checked = []
    replaced = ["config.json"]

    def check(repo: str, source: str, private: bool) -> list[str]:
        checked.append((repo, source, private))
        return replaced

    monkeypatch.setattr(module, "check_upload", check)
    monkeypatch.setattr(module, "send", lambda *a, **more: sent.append((a, more)) or "page")
    with pytest.raises(MintError, match="holds an earlier upload"):
        upload(finished, "me/new")
    assert (finished / "README.md").read_text() == CARD
    assert upload(finished, "me/new", public=True, replace=True) == "page"
    assert checked[-1] == ("me/new", "org/model", False)
    assert sent == [((finished, "me/new"), {"private": False})]
    card = (finished / "README.md").read_text()
    assert card == CARD.replace("# model", "# me/new").replace("--model model", "--model me/new")
    with pytest.raises(UsageError, match="write org/name"):
        upload(finished, "new")


def test_what_is_not_finished_or_not_ours_is_refused(finished: Path, make: Maker) -> None:
    assert find_finished(finished).source == "org/model"
    with pytest.raises(MintError, match="was not written by mint-mlx"):
        find_finished(make(llama(1), "other"))
    with pytest.raises(MintError, match="is no folder"):
        find_finished("nowhere")
    partial = finished.rename(finished.with_name("model.partial"))
    with pytest.raises(MintError, match="is not finished"):
        find_finished(partial)
    whole = partial.rename(finished)
    (whole / "model.safetensors").unlink()
    with pytest.raises(MintError):
        find_finished(whole)


def test_the_command_uploads(cli: Cli, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "check_upload", lambda *a, **more: [])
    monkeypatch.setattr(publish, "upload", lambda folder, repo, private: f"page-of-{repo}")
    ran = cli("upload", finished, "me/new", "--json")
    assert ran.code == 0
    assert ran.json == {"path": str(finished), "uploaded": "page-of-me/new"}
    assert "--model me/new" in (finished / "README.md").read_text()
