"""GGUF files and the quantizer of llama.cpp as peers: sizes, what falls back, what is missing."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, llama, qwen3_moe
from mlx.utils import tree_flatten

from mint_mlx.base.errors import MintError
from mint_mlx.base.report import Silent
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.eval import gguf_file, peer_gguf, peers
from mint_mlx.eval.build import Task, build
from mint_mlx.eval.gguf_names import gguf_name, rotated_heads
from mint_mlx.jobs.model import prepare


def test_without_llama_cpp_a_row_says_how_to_install_it(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(peer_gguf.LIBRARY, str(tmp_path))
    monkeypatch.setenv("PATH", "")
    job = prepare(str(make(llama(1))))
    budget = int(4.9 * job.inventory.parameters / 8)
    (peer,) = peers.make_peers("Q4_K_M", job.source, job.inventory, budget, None)
    with pytest.raises(MintError, match="isn't installed"):
        peer.build(tmp_path / "out")
    assert not peers.make_peers("Q8_0", job.source, job.inventory, budget, None)


def test_a_row_says_what_falls_back(make: Maker) -> None:
    inventory = prepare(str(make(llama(1)))).inventory
    assert "fall back to other types" in peer_gguf.about("Q4_K_M", inventory)
    assert "fall back" not in peer_gguf.about("Q4_0", inventory)


def test_names_and_the_order_of_rows() -> None:
    assert gguf_name("model.layers.12.mlp.switch_mlp.up_proj.weight") == "blk.12.ffn_up_exps.weight"
    assert gguf_name("model.layers.0.surprise.weight") is None
    assert rotated_heads("blk.0.attn_k.weight", "llama", 8, 2) == 2
    assert rotated_heads("blk.0.attn_q.weight", "qwen3moe", 8, 2) is None
    rows = np.arange(16)[:, None] * np.ones(3)
    pairs = gguf_file._reorder(rows, 2, to_pairs=True)
    assert pairs[:4, 0].tolist() == [0, 4, 1, 5]
    np.testing.assert_array_equal(gguf_file._reorder(pairs, 2, to_pairs=False), rows)


def test_a_file_that_is_no_gguf_is_refused(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"abcde")
    with pytest.raises(MintError, match="is no GGUF file"):
        gguf_file.check_gguf(prepare(str(make(llama(1)))).source, [tmp_path / "x.gguf"])


def test_the_size_of_an_unpacked_file_is_that_of_its_codes(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        tensors = {"x": mx.zeros((64, 64))}
        metadata = {gguf_file.PACKED: "1234"}
        mx.save_safetensors(str(folder / gguf_file.WEIGHTS), tensors, metadata=metadata)

    built = build(Task("Q4_0", "peer", False, "", 99, build=write), tmp_path, Silent())
    assert (built.bytes, built.unpacked) == (1234, True)


@pytest.mark.parametrize("model", [llama(2), qwen3_moe(2)])
def test_a_source_written_as_gguf_is_read_back_as_it_was(
    make: Maker, tmp_path: Path, model: object
) -> None:
    pytest.importorskip("gguf")
    source = load_source(str(make(model)))  # type: ignore[arg-type]
    gguf_file.write_gguf(source, tmp_path / "x.gguf")
    gguf_file.read_gguf(source, tmp_path / "x.gguf", tmp_path / "out")
    again = dict(tree_flatten(open_model(load_source(str(tmp_path / "out"))).parameters()))
    for name, array in tree_flatten(open_model(source).parameters()):
        assert mx.array_equal(again[name].astype(mx.float32), array.astype(mx.float32)), name
    assert (
        gguf_file.packed_bytes(tmp_path / "out")
        == 4 * prepare(str(source.path)).inventory.parameters
    )

    (tmp_path / "cut.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:100])
    with pytest.raises(MintError, match=r"cut\.gguf is no GGUF file that can be read"):
        gguf_file.read_gguf(source, tmp_path / "cut.gguf", tmp_path / "other")


def test_a_head_of_the_files_own_is_used(make: Maker, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tied = load_source(str(make(llama(1, tied=True), "tied")))
    untied = load_source(str(make(llama(1), "untied")))
    gguf_file.write_gguf(untied, tmp_path / "x.gguf")
    gguf_file.read_gguf(tied, tmp_path / "x.gguf", tmp_path / "out")
    again = dict(tree_flatten(open_model(load_source(str(tmp_path / "out"))).parameters()))
    head = dict(tree_flatten(open_model(untied).parameters()))["lm_head.weight"]
    assert mx.array_equal(again["lm_head.weight"], head.astype(mx.float32))


def test_files_of_other_models_are_refused(make: Maker, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    one = load_source(str(make(llama(1), "one")))
    gguf_file.write_gguf(load_source(str(make(llama(2), "two"))), tmp_path / "two.gguf")
    moe = load_source(str(make(qwen3_moe(1), "moe")))
    gguf_file.write_gguf(moe, tmp_path / "moe.gguf")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, sentence in (
        ("two", r"it holds blk\.1\.attn_k\.weight, which that one has no place for"),
        ("moe", "its architecture is qwen3moe in place of llama"),
        ("part", "is one of 3 parts: join them"),
    ):
        with pytest.raises(MintError, match=sentence):
            gguf_file.read_gguf(one, tmp_path / f"{name}.gguf", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_another_llama_cpp_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(peer_gguf.LIBRARY, raising=False)
    monkeypatch.chdir(tmp_path)
    assert peer_gguf.quantizer_stamp() == ""
    stamps = []
    for text in ("#!/bin/sh", "#!/bin/sh\n"):
        program = tmp_path / peer_gguf.PROGRAM
        program.write_text(text)
        program.chmod(0o755)
        stamps.append(peer_gguf.quantizer_stamp())
    assert "" not in stamps and len(set(stamps)) == 2
