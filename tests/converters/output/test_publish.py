"""An upload replaces nothing but an earlier upload of ours, and says what it replaces."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.cli.output import Output
from mint_mlx.cli.upload import check_words, prepare_upload, upload_result
from mint_mlx.converters.output import publish
from mint_mlx.converters.output.publish import check_upload, upload

PLAN = "mint_mlx_plan: 1\nlayers:\n- {layer: a, as: 4bit-g64}\n"
OURS = ["README.md", "config.json", "mint-plan.yaml", "model-00001-of-00002.safetensors"]


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """hold(names, private, plan) makes the Hub's me/mine; with names None there is none."""

    def serve(names: list[str] | None, private: bool = True, plan: str = PLAN) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        class Api:
            def whoami(self) -> None: ...

            def repo_info(self, repo: str) -> SimpleNamespace:
                if names is None:
                    raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
                files = [SimpleNamespace(rfilename=name) for name in names]
                return SimpleNamespace(private=private, siblings=files)

        (tmp_path / "plan.yaml").write_text(plan)
        monkeypatch.setattr("huggingface_hub.HfApi", Api)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: tmp_path / "plan.yaml")

    return serve


@pytest.mark.parametrize(
    ("private", "wanted"), [(True, False), (False, True), (True, True), (None, True)]
)
def test_a_repository_is_as_private_as_it_is_said_to_be(
    private: bool | None, wanted: bool, hold: Any
) -> None:
    """`private` is what the repository is; None where there is none yet."""
    hold(None if private is None else [], private)
    if private is (not wanted):
        with pytest.raises(MintError, match="exists and is"):
            check_upload("me/mine", "org/model", private=wanted)
    else:
        assert check_upload("me/mine", "org/model", private=wanted) == []


@pytest.mark.parametrize(
    ("names", "plan"),
    [
        (["model.safetensors", "config.json"], PLAN),
        (["pytorch_model.bin"], PLAN),
        (["gguf/model.gguf"], PLAN),
        ([*OURS, "adapters.safetensors"], PLAN),
        ([*OURS, "original/model.safetensors"], PLAN),
        (OURS, "layers: []\n"),
        (OURS, "mint_mlx_plan: [\n"),
    ],
)
def test_weights_of_others_are_never_replaced(names: list[str], plan: str, hold: Any) -> None:
    hold(names, plan=plan)
    with pytest.raises(MintError, match="which mint-mlx did not upload"):
        check_upload("me/mine", "org/model", private=True)


@pytest.mark.parametrize("source", ["me/mine", "Me/Mine"])
def test_the_source_s_own_repository_is_refused(source: str) -> None:
    with pytest.raises(MintError, match="is the source itself"):
        check_upload("me/mine", source, private=True)


def test_what_is_replaced_is_shown_and_asked_for(
    hold: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hold([*OURS, "pictures/a.png"])
    assert check_upload("me/mine", "org/model", private=True) == OURS
    asked = ("me/mine", "org/model", False)

    # Without a terminal nobody can be asked.
    with pytest.raises(MintError, match="give --yes"):
        prepare_upload(*asked, False, Output())
    assert f"me/mine: {', '.join(OURS)}" in " ".join(capsys.readouterr().err.split())
    prepare_upload(*asked, True, Output())

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for answer in (True, False):
        monkeypatch.setattr(typer, "confirm", lambda *_, answer=answer, **more: answer)
        if answer:
            prepare_upload(*asked, False, Output())
        else:
            with pytest.raises(MintError, match="stays as it is"):
                prepare_upload(*asked, False, Output())

    # A new repository replaces nothing.
    hold(None)
    prepare_upload(*asked, False, Output())


def test_options_of_an_upload_need_one() -> None:
    for public, yes in ((True, False), (False, True)):
        with pytest.raises(UsageError, match="give that too"):
            check_words(None, public, yes)


def test_an_upload_leaves_no_shard_of_another_size_and_takes_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, **more: Any) -> str:
            return f"page-of-{repo}"

        def upload_folder(self, **more: Any) -> None:
            asked.update(more)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    for name in (*OURS, "thesis.txt", ".DS_Store"):
        (tmp_path / name).write_text("")
    assert upload(tmp_path, "me/mine", private=True) == "page-of-me/mine"
    assert asked["allow_patterns"] == OURS

    # A shard whose name is a pattern lets no other file along.
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "[a-z]*.safetensors"}}')
    (tmp_path / "[a-z]*.safetensors").write_text("")
    upload(tmp_path, "me/mine", private=True)
    assert "[[]a-z][*].safetensors" in asked["allow_patterns"]
    assert not [name for name in asked["allow_patterns"] if fnmatch("thesis.safetensors", name)]
    for name in (index.name, "[a-z]*.safetensors"):
        (tmp_path / name).unlink()

    # Files of an earlier upload are deleted there, others stay.
    ours = [
        "model-00004-of-00004.safetensors",
        "model.safetensors.index.json",
        "mint-refined.json",
    ]
    names = [*ours, "README.md", "own.txt", "model-lora.safetensors", "mint-thesis.txt"]
    patterns = asked["delete_patterns"]
    assert ours == [n for n in names if any(fnmatch(n, pattern) for pattern in patterns)]


def test_weights_that_appear_meanwhile_stay(
    hold: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(["model.safetensors"])
    monkeypatch.setattr(publish, "upload", lambda *_, **more: pytest.fail("it was uploaded"))
    with pytest.raises(MintError, match="did not upload"):
        upload_result(tmp_path, "me/mine", "org/model", False, Output())
    assert "was not uploaded" in " ".join(capsys.readouterr().err.split())
