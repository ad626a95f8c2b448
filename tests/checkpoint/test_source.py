"""A checkpoint as a source: what is refused, its name, and what its fingerprint follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import Cli, Maker, edit_config, edit_weights, llama

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.source import load_source
from mint_mlx.jobs.convert import convert


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:500])


def spoil_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")


def spoil_text_config(folder: Path) -> None:
    edit_config(folder, text_config="x")


def say_gptq(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})


def spoil_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("blobs/gone")


def int8(folder: Path) -> None:
    edit_weights(folder, lambda w: w | {"lm_head.weight": w["lm_head.weight"].astype(mx.int8)})


def extra_tensor(folder: Path) -> None:
    edit_weights(folder, lambda w: w | {"model.surprise": mx.zeros((2,))})


def spoil_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)


def spoil_type(folder: Path) -> None:
    edit_config(folder, model_type="no_such_model")


def spoil_shape(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=7)


def spoil_depth(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10**6)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_fields(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def bring_code(folder: Path) -> None:
    edit_config(folder, model_file="evil.py")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_tokenizer, "no tokenizer"),
        (cut_tokenizer, "tokenizer of model cannot be read"),
        (spoil_template, "chat template"),
        (spoil_text_config, "text_config"),
        (say_gptq, "quantized with GPTQ"),
        (spoil_link, "not a regular file"),
        (int8, "lm_head has weights of type I8"),
        (extra_tensor, "model.surprise"),
        (spoil_weights, "truncated"),
        (spoil_type, "no model of type 'no_such_model'"),
        (spoil_depth, "num_hidden_layers is 1000000"),
        (spoil_shape, "cannot build"),
        (spoil_config, "not valid JSON"),
        (spoil_fields, "cannot build"),
        (bring_code, "code of its own"),
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


def test_a_snapshot_is_called_by_its_repository(make: Maker) -> None:
    made = make(llama(1), "models--org--some--name")
    folder = made / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    for file in [f for f in made.iterdir() if f.is_file()]:
        file.rename(folder / file.name)
    assert load_source(str(folder)).name == "org/some--name"


@pytest.mark.parametrize("name", ["models/My--Model", "org/name.git", "./nowhere", "~nouser/x"])
@pytest.mark.parametrize("command", ["doctor", "inspect", "profile"])
def test_names_that_are_none(cli: Cli, command: str, name: str) -> None:
    refused = cli(command, name)
    assert refused.code == 1
    assert len(refused.err.splitlines()) == 1
    assert "does not exist" in refused.err or "check the spelling" in refused.err


def test_the_fingerprint_follows_config_and_weights(make: Maker) -> None:
    first = load_source(str(make(llama(1), "a")))
    same = load_source(str(make(llama(1), "b")))
    other = load_source(str(make(llama(1), "c", seed=1)))
    assert first.fingerprint == same.fingerprint
    assert first.structure == other.structure
    assert first.content != other.content
    config = json.loads((same.path / "config.json").read_text()) | {"rope_theta": 5.0}
    (same.path / "config.json").write_text(json.dumps(config))
    assert load_source(str(same.path)).structure != first.structure
