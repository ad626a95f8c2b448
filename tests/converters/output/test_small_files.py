"""Small files come along with the weights, and others don't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Maker, Notes, edit_config, llama

from mint_mlx.base.errors import MintError
from mint_mlx.base.side_files import code_files, side_files
from mint_mlx.jobs.convert import convert

SMALL_FILES = {
    "chat_template.jinja",
    "generation_config.json",
    "added_tokens.json",
    "merges.txt",
    "LICENSE",
    "USE_POLICY.md",
    "spiece.model",
    "qwen.tiktoken",
    "additional_chat_templates/tool.jinja",
}
OTHERS = {"notes.pdf", "secrets.json", "passwords.txt", "train.py", "original", "LICENSE-LONG"}


def test_small_files_and_a_card_come_along(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    (folder / "additional_chat_templates").mkdir()
    for name in SMALL_FILES:
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nmetrics: [x]\n---\nhello")
    (folder / "original").mkdir()
    (folder / "LICENSE-LONG").write_text("x" * 1_000_001)
    for name in OTHERS - {"original", "LICENSE-LONG"}:
        (folder / name).write_text("")
    notes = Notes()

    convert(str(folder), "6bpw", tmp_path / "out", smoke=False, report=notes)
    out = tmp_path / "out"
    names = {str(f.relative_to(out)) for f in out.rglob("*")}
    assert names >= SMALL_FILES
    assert names >= {"tokenizer.json", "tokenizer_config.json", "mint-plan.yaml"}
    assert not names & OTHERS
    assert f"not copied from model: {', '.join(sorted(OTHERS))}" in notes.said

    # The card has the source's licence and none of its other claims, and no path of this machine.
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "library_name: mlx" in card
    assert "| 6bit-" in card
    assert "metrics" not in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "mint-plan.yaml").read_text()


def test_an_adapter_beside_the_model_is_told(make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    notes = Notes()
    convert(str(folder), "6bpw", tmp_path / "out", smoke=False, report=notes)
    assert any("an adapter lies beside the model" in note for note in notes.said)


def test_a_link_out_of_the_folder_is_not_followed(make: Maker, tmp_path: Path) -> None:
    """But one to the Hub's blobs is, as its cache is made of such links."""
    folder = make(llama(1))
    blobs = tmp_path / "models--org--x" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / ("a" * 40)).write_text("{}")
    (tmp_path / "secret").write_text("secret")
    for name, target in {
        "NOTICE": tmp_path / "secret",
        "additional_chat_templates/tool.jinja": tmp_path / "secret",
        "vocab.json": blobs / ("a" * 40),
        "added_tokens.json": folder / "tokenizer_config.json",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
    beside = side_files(folder)
    assert set(beside.copied) >= {"vocab.json", "added_tokens.json", "tokenizer.json"}
    assert beside.others == ("NOTICE",)
    assert "additional_chat_templates/tool.jinja" not in beside.copied

    # A result without its tokenizer would be of no use.
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(MintError, match="are links to files outside"):
        convert(str(folder), "6bpw", tmp_path / "out", smoke=False)


def test_code_that_configs_name_comes_along_with_what_it_imports(make: Maker) -> None:
    folder = make(llama(1))
    edit_config(folder, auto_map={"AutoConfig": "settings.Own", "AutoModel": "other/repo--m.Own"})
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None], "AutoBad": 3, "x": "../up.Own"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        "from .inner import x\n\nimport json\nfrom . import y\n"
        "NAMES = {'a': 'words.bpe', 'b': \"gone.txt\", 'c': '../up.txt'}\n"
    )
    for name in ("words.bpe", "other.txt", "../up.txt"):
        (folder / name).write_text("")
    for name in ("inner.py", "settings.py", "m.py", "train.py", "json.py"):
        (folder / name).write_text("from .own import z\n")
    (folder.parent / "up.py").write_text("")
    named = {"own.py", "inner.py", "settings.py", "words.bpe"}
    assert code_files(folder) == named
    assert named < set(side_files(folder).copied)
    assert side_files(folder).others == ("json.py", "m.py", "other.txt", "train.py")


def test_activations_stay_packed_only_where_mlx_lm_can_do_that(make: Maker, tmp_path: Path) -> None:
    """mlx-lm 0.32 loads no other mode than nvfp4 and mxfp8 with `quantize_activations`."""
    folder = make(llama(1))
    edit_config(folder, quantize_activations=True)
    for uniform, says in (("mxfp8", True), ("4bit-g64", None)):
        out = tmp_path / uniform
        convert(str(folder), uniform=uniform, out=out, smoke=False)
        config = json.loads((out / "config.json").read_text())
        assert config.get("quantize_activations") is says
