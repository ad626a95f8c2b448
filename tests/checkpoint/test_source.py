"""A checkpoint as a source: what is refused, its name, and what its fingerprint follows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import Cli, Maker, Notes, edit_config, edit_weights, llama

from mint_mlx.base.errors import MintError, NeedsWeights
from mint_mlx.base.safetensors_header import read_header
from mint_mlx.checkpoint import hub, source
from mint_mlx.checkpoint.source import Source, check_unchanged, load_source
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.measurements import first_token
from mint_mlx.jobs.model import prepare


def half_a_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:500])


def bad_text_config(folder: Path) -> None:
    edit_config(folder, text_config="x")


def gptq(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    edit_weights(folder, lambda w: w | {"lm_head.weight": mx.zeros((96, 16), dtype=mx.int32)})


def broken_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/gone")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "generation_config.json")  # which mlx-lm would wait for without end


def int8_weights(folder: Path) -> None:
    edit_weights(folder, lambda w: w | {"lm_head.weight": w["lm_head.weight"].astype(mx.int8)})


def extra_tensor(folder: Path) -> None:
    edit_weights(folder, lambda w: w | {"model.surprise": mx.zeros((2,))})


def half_the_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)


def unknown_type(folder: Path) -> None:
    edit_config(folder, model_type="no_such_model")


def too_many_blocks(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=7)


def a_million_blocks(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10**6)


def half_a_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_of_a_type_only(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def code_beside_it(folder: Path) -> None:
    edit_config(folder, model_file="evil.py")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (half_a_tokenizer, "tokenizer of model cannot be read"),
        (bad_text_config, "text_config"),
        (gptq, "packed as I32, but not as mint-mlx reads GPTQ"),
        (broken_link, "not a regular file"),
        (pipe, "generation_config.json, which is a pipe"),
        (int8_weights, "lm_head.weight is of type I8"),
        (extra_tensor, "model.surprise"),
        (half_the_weights, "truncated"),
        (unknown_type, "no model of type 'no_such_model'"),
        (a_million_blocks, "num_hidden_layers is 1000000"),
        (too_many_blocks, "cannot build"),
        (half_a_config, "not valid JSON"),
        (config_of_a_type_only, "cannot build"),
        (code_beside_it, "code of its own"),
    ],
)
def test_bad_sources_are_refused_and_leave_nothing(
    make: Maker, tmp_path: Path, spoil: Any, problem: str
) -> None:
    folder = make(llama(2))
    spoil(folder)
    with pytest.raises(MintError, match=problem):
        convert(str(folder), "5bpw", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_a_source_without_a_tokenizer_is_converted_with_a_note(make: Maker, tmp_path: Path) -> None:
    folder, notes = make(llama(1)), Notes()
    (folder / "tokenizer.json").unlink()
    result = convert(str(folder), uniform="keep", out=tmp_path / "out", report=notes)
    assert result.sentence is None
    assert any("has no tokenizer" in note and "original model" in note for note in notes.said)
    assert first_token(prepare(str(folder))) is None  # its own text starts at random


def test_a_snapshot_is_called_by_its_repository(make: Maker) -> None:
    cache = make(llama(1), "models--org--some--name")
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in [f for f in cache.iterdir() if f.is_file()]:
        file.rename(snapshot / file.name)
    assert load_source(str(snapshot)).name == "org/some--name"


def test_what_only_the_weights_tell_is_downloaded(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))

    def needs_weights(repo: hub.RepoId) -> Source:
        raise NeedsWeights("bitsandbytes")

    monkeypatch.setattr(source, "_from_skeleton", needs_weights)
    monkeypatch.setattr(hub, "download", lambda repo: (folder, "c" * 40))
    loaded = load_source("org/tiny", weights=False)
    assert loaded.has_weights
    assert (loaded.name, loaded.revision) == ("org/tiny", "c" * 40)


@pytest.mark.parametrize("name", ["models/My--Model", "org/name.git", "./nowhere", "~nouser/x"])
@pytest.mark.parametrize("command", ["doctor", "inspect", "profile"])
def test_names_that_are_none(cli: Cli, command: str, name: str) -> None:
    refused = cli(command, name)
    assert refused.code == 1
    assert len(refused.err.splitlines()) == 1
    assert "does not exist" in refused.err or "check the spelling" in refused.err


@pytest.mark.parametrize("rights", [0o000, 0o444, 0o111])
def test_a_folder_that_cannot_be_read_is_named(cli: Cli, rights: int) -> None:
    """As another user than root, who may look into every folder."""
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:  # pytest's own folders are private
        folder = Path(shared) / "model"
        folder.mkdir()
        root = os.geteuid() == 0
        os.chmod(shared, 0o755)
        folder.chmod(rights)
        try:
            os.seteuid(65534 if root else os.geteuid())
            ran = cli("doctor", folder)
        finally:
            os.seteuid(0 if root else os.geteuid())
            folder.chmod(0o755)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        f"error: the folder {folder} cannot be read: check its permissions, or give another one\n"
    )


def test_the_fingerprint_follows_config_and_weights(make: Maker) -> None:
    first = load_source(str(make(llama(1), "a")))
    same = load_source(str(make(llama(1), "b")))
    other = load_source(str(make(llama(1), "c", seed=1)))
    assert first.fingerprint == same.fingerprint
    assert first.structure == other.structure
    assert first.content != other.content
    edit_config(same.path, rope_theta=5.0)
    assert load_source(str(same.path)).structure != first.structure


def test_unfinished_work_never_mixes_two_versions_of_a_source(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large local source is known by samples, which may miss a change: its files count too."""
    folder = make(llama(1))
    hashed = load_source(str(folder))
    assert hashed.identity == hashed.fingerprint
    monkeypatch.setattr(source, "WHOLE", 0)
    monkeypatch.setattr(source, "SAMPLE", 4)
    sampled = load_source(str(folder))
    assert sampled.identity == load_source(str(folder)).identity != sampled.fingerprint

    # One byte between the samples, in as many bytes.
    shard = folder / "model.safetensors"
    with shard.open("r+b") as file:
        start = read_header(shard)[1]
        file.seek(start + 6)
        byte = file.read(1)
        file.seek(start + 6)
        file.write(bytes([byte[0] ^ 1]))
    changed = load_source(str(folder))
    assert changed.fingerprint == sampled.fingerprint
    assert changed.identity != sampled.identity


def test_a_source_that_changes_while_it_is_read_is_refused(make: Maker) -> None:
    folder = make(llama(1))
    opened = load_source(str(folder))
    check_unchanged(opened)
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(MintError, match="have changed while they were read"):
        check_unchanged(opened)
    shard.write_bytes(data)
    os.utime(shard, ns=(1, 1))
    with pytest.raises(MintError, match="have changed while they were read"):
        check_unchanged(opened)
