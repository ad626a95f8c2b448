"""A head that is stored beside a tied config: a copy is dropped, another one is used."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from families import config_of, write_family
from helpers import Maker, Weights, edit_config, edit_weights, llama
from released import released

from mint_mlx.base.errors import MintError
from mint_mlx.base.safetensors_header import read_folder, read_header
from mint_mlx.checkpoint import hub, source
from mint_mlx.checkpoint.config_file import read_config
from mint_mlx.checkpoint.mlxlm import bare_model, build_model
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.checkpoint.tied_head import SAMPLE, with_own_head
from mint_mlx.jobs.convert import convert

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tie(folder: Path, equal: bool) -> Path:
    """State a tied config of a checkpoint, and store a head beside it."""

    def change(weights: Weights) -> Weights:
        embedding = weights[EMBEDDING]
        head = embedding if equal else mx.concatenate([embedding[:-1], embedding[:1]])
        return weights | {HEAD: head}

    edit_weights(folder, change)
    edit_config(folder, tie_word_embeddings=True)
    return folder


def test_a_copy_is_dropped(make: Maker, tmp_path: Path) -> None:
    source = tie(make(llama(1)), equal=True)
    result = convert(str(source), uniform="keep", out=tmp_path / "out", smoke=False)
    assert HEAD not in mx.load(str(result.path / "model.safetensors"))
    assert json.loads((result.path / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("family", [None, "gemma3_text"])
def test_a_copy_alone_is_the_embedding(make: Maker, tmp_path: Path, family: str | None) -> None:
    """As `safetensors.torch.save_model` leaves it: of a tensor's names the first by alphabet."""
    source = tie(make(llama(1)), equal=True)
    if family:
        source = released(family, tmp_path / "source")
        next(source.glob("model-*.safetensors")).rename(source / "model.safetensors")
        (source / "model.safetensors.index.json").unlink()
    edit_config(source, tie_word_embeddings=True)
    embedding: list[mx.array] = []

    def rename(weights: Weights) -> Weights:
        embedding.append(weights.pop("model.embed_tokens.weight"))
        return weights | {HEAD: embedding[0]}

    edit_weights(source, rename)
    result = convert(str(source), uniform="keep", out=tmp_path / "out", smoke=False)
    written = mx.load(str(result.path / "model.safetensors"))
    assert HEAD not in written
    assert mx.array_equal(written["model.embed_tokens.weight"], embedding[0])


def test_another_head_is_used_and_stock_mlx_lm_reads_it(make: Maker, tmp_path: Path) -> None:
    source = tie(make(llama(1)), equal=False)
    result = convert(str(source), uniform="keep", out=tmp_path / "out")
    written = mx.load(str(result.path / "model.safetensors"))
    stored = mx.load(str(source / "model.safetensors"))
    assert mx.array_equal(written[HEAD], stored[HEAD])
    assert json.loads((result.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head" in build_model(source)


@pytest.mark.parametrize("equal", [True, False])
def test_of_a_model_on_the_hub_some_rows_decide(
    equal: bool, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tie(make(llama(1)), equal)
    shard = folder / "model.safetensors"
    data, start = shard.read_bytes(), read_header(shard)[1]
    hub.drop_shard(shard)
    sent = []

    def fetch(name: str, commit: str, file: str, ranges: list[tuple[int, int]], at: Path) -> None:
        with (at / file).open("r+b") as out:
            for begin, end in ranges:
                out.seek(start + begin)
                out.write(data[start + begin : start + end])
                sent.append(end - begin)

    monkeypatch.setattr(hub, "fetch_ranges", fetch)
    config, headers = read_config(folder), read_folder(folder)
    skeleton = hub.Skeleton(folder, "main", {}, 0)
    decided = source._with_own_head(config, skeleton, headers, "org/tiny")
    assert decided["tie_word_embeddings"] is equal
    assert len(sent) == 2 * SAMPLE
    assert ("lm_head" in build_model(folder)) != equal  # also where all is empty again


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_families_that_mlx_lm_ties_by_default(family: str, tmp_path: Path) -> None:
    copied = tie(write_family(tmp_path / "copied", family, tie_word_embeddings=True), equal=True)
    assert "lm_head" not in build_model(copied)
    other = tie(write_family(tmp_path / "other", family, tie_word_embeddings=True), equal=False)
    assert "lm_head" in build_model(other)
    assert load_source(str(other)).config["tie_word_embeddings"] is False


def test_a_class_without_a_head_refuses_another_one(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "copied", "cohere2")
    tie(folder, equal=True)
    build_model(folder)
    tie(folder, equal=False)
    with pytest.raises(MintError, match=r"lm_head.weight that differs .* no head of its own"):
        load_source(str(folder))


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss"])
def test_a_class_that_always_has_a_head_gets_the_embedding(family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "moe", family)
    edit_weights(folder, lambda w: {k: a for k, a in w.items() if k != HEAD})
    with pytest.raises(MintError, match=r"Missing 1 parameters: lm_head.weight"):
        open_model(load_source(str(folder)))

    edit_config(folder, tie_word_embeddings=True)
    result = convert(str(folder), uniform="keep", out=tmp_path / "out", smoke=False)
    written = mx.load(str(result.path / "model.safetensors"))
    stored = mx.load(str(folder / "model.safetensors"))
    assert mx.array_equal(written[HEAD], stored[EMBEDDING])
    assert mx.array_equal(written[EMBEDDING], stored[EMBEDDING])


def test_a_class_that_wants_a_head_refuses_a_tied_model(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "moe", "qwen3_vl_moe")
    edit_weights(folder, lambda w: {k: a for k, a in w.items() if "lm_head" not in k})
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"tie_word_embeddings": True}
    edit_config(folder, text_config=text, tie_word_embeddings=True)
    with pytest.raises(MintError, match=r"has no head but its embedding, .* wants one of its own"):
        open_model(load_source(str(folder)))


def test_types_may_differ_where_the_numbers_do_not(make: Maker) -> None:
    folder = tie(make(llama(1)), equal=True)
    edit_weights(folder, lambda w: w | {HEAD: w[HEAD].astype(mx.float32)})
    assert "lm_head" not in build_model(folder)


def test_a_nested_config_is_untied_in_both_tables(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "moe", "qwen3_5_moe")
    config = config_of("qwen3_5_moe")
    config["text_config"] = config["text_config"] | {"tie_word_embeddings": True}
    head, embedding = mx.ones((96, 64)), mx.zeros((96, 64))
    embedding[3] = 1
    tensors = {HEAD: head, "model.language_model.embed_tokens.weight": embedding}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    untied = with_own_head(config, folder, read_folder(folder), bare_model)
    assert untied["tie_word_embeddings"] is untied["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("stored", "stated", "tied"),
    [
        ("none", {}, True),
        ("none", {"tie_word_embeddings": True}, True),
        ("none", {"tie_word_embeddings": False}, None),  # it is missing
        ("other", {}, False),
        ("other", {"tie_word_embeddings": True}, False),
        ("copy", {"tie_word_embeddings": True}, True),
        ("copy", {"tie_word_embeddings": False}, False),
        ("packed", {}, None),  # its class decides, as it was
    ],
)
def test_what_an_inner_table_leaves_out_is_told_by_the_tensors(
    stored: str, stated: dict[str, bool], tied: bool | None, tmp_path: Path
) -> None:
    folder = write_family(tmp_path / "moe", "qwen3_5_moe")
    embedding = mx.arange(96 * 64).reshape(96, 64).astype(mx.bfloat16)
    tensors = {"model.language_model.embed_tokens.weight": embedding}
    if stored in ("other", "copy"):
        tensors[HEAD] = embedding if stored == "copy" else embedding + 1
    elif stored == "packed":
        tensors["lm_head.qweight"] = mx.zeros((8, 96), dtype=mx.int32)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)

    config = config_of("qwen3_5_moe")
    text = {k: v for k, v in config["text_config"].items() if k != "tie_word_embeddings"}
    config = {k: v for k, v in config.items() if k != "tie_word_embeddings"}
    config |= {"text_config": text} | stated
    decided = with_own_head(config, folder, read_folder(folder), bare_model)
    if tied is None:
        assert decided == config
    else:
        assert decided["tie_word_embeddings"] is decided["text_config"]["tie_word_embeddings"]
        assert decided["tie_word_embeddings"] is tied
