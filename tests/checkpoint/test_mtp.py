"""Blocks for multi-token prediction in a file beside the model, where other programs look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from fake_hub import FakeHub
from helpers import Notes
from mlx.utils import tree_flatten
from released import known, released

from mint_mlx.base.errors import MintError
from mint_mlx.base.files import MTP_FILE
from mint_mlx.base.folders import CHECKPOINT
from mint_mlx.base.remove import known_files
from mint_mlx.base.safetensors_header import INDEX, TensorInfo, read_folder, read_header
from mint_mlx.checkpoint.towers import UnusedTensors, find_unused, remarks, with_towers
from mint_mlx.converters.output.copied import copied
from mint_mlx.jobs import convert
from mint_mlx.jobs.doctor import doctor
from mint_mlx.jobs.model import prepare

TOKENS = mx.array(np.random.default_rng(0).integers(9, 90, (1, 16)))


def source_of(family: str, folder: Path) -> Path:
    if not known(family):
        pytest.skip("this mlx-lm has no such family")
    return released(family, folder)


def logits(folder: Path) -> mx.array:
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    result: mx.array = model(TOKENS)
    return result


def files_of(folder: Path) -> dict[str, mx.array]:
    arrays: dict[str, Any] = {}
    for file in read_folder(folder):
        arrays |= mx.load(str(folder / file))  # type: ignore[arg-type]
    return arrays


@pytest.mark.parametrize("family", ["qwen3_5_moe", "glm4_moe"])
def test_the_blocks_are_kept_as_they_are(tmp_path: Path, family: str) -> None:
    model = source_of(family, tmp_path / family)
    notes = Notes()
    result = convert.convert(
        str(model), "9bpw", tmp_path / "mtp", parts="mtp", smoke=False, report=notes
    )
    assert any(f"are copied into {MTP_FILE}" in note for note in notes.said)
    wanted = prepare(str(model)).unused.mtp
    assert len(wanted) > 10

    # The source's names and values, counted in the budget to the byte, and in no index.
    stored: dict[str, mx.array] = mx.load(str(result.path / MTP_FILE))  # type: ignore[assignment]
    original = files_of(model)
    assert stored.keys() == wanted.keys()
    for name, array in stored.items():
        assert array.dtype == original[name].dtype
        assert mx.array_equal(array, original[name])
    files = sum(file.stat().st_size for file in result.path.glob("*.safetensors"))
    assert files == result.bytes <= 9 * result.inventory.parameters / 8
    index = json.loads((result.path / INDEX).read_text())["weight_map"]
    assert not index.keys() & wanted.keys()

    # config.json promises them, and says nothing of a tower; the doctor and what deletes know them.
    config = json.loads((result.path / "config.json").read_text())
    depth = {**config, **config.get("text_config", {})}
    assert 1 in (depth.get("mtp_num_hidden_layers"), depth.get("num_nextn_predict_layers"))
    assert "vision_config" not in config
    assert doctor(str(result.path)).findings == []
    assert MTP_FILE in known_files(result.path, CHECKPOINT)
    card = (result.path / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card

    # Stock mlx-lm runs the same model, and a copy (as `refine` makes one) has the file too.
    edited = tmp_path / "text.yaml"
    plan = (result.path / "mint-plan.yaml").read_text()
    edited.write_text(plan.replace("parts: mtp", "parts: text"))
    text = convert.convert(str(model), plan=edited, out=tmp_path / "text", smoke=False)
    assert mx.array_equal(logits(result.path), logits(text.path))
    assert not (text.path / MTP_FILE).exists()
    with copied(result.path, tmp_path / "copy", force=False) as work:
        assert (work / MTP_FILE).read_bytes() == (result.path / MTP_FILE).read_bytes()


def test_all_parts_have_the_tower_and_the_blocks(tmp_path: Path) -> None:
    model = source_of("qwen3_5_moe", tmp_path / "model")
    folder = convert.convert(
        str(model), uniform="8bit-g32", out=tmp_path / "all", parts="all", smoke=False
    ).path
    unused = prepare(str(model)).unused
    assert read_header(folder / MTP_FILE)[0].keys() == unused.mtp.keys()
    names = {name for table in read_folder(folder).values() for name in table}
    assert unused.towers.keys() <= names
    assert doctor(str(folder)).findings == []

    # A loader that reads them with the model takes it for an original: the doctor says so.
    path = folder / INDEX
    index = json.loads(path.read_text())
    listed = dict.fromkeys(unused.mtp, MTP_FILE)
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | listed}))
    (finding,) = doctor(str(folder)).findings
    assert "mlx-vlm and LM Studio take the norms for an original's" in finding.problem
    path.unlink()
    assert any("without an index" in f.problem for f in doctor(str(folder)).findings)


def test_what_has_none_is_told_and_what_cannot_be_copied_refused(tmp_path: Path) -> None:
    notes = Notes()
    model = released("llama", tmp_path / "llama")
    convert.convert(
        str(model), uniform="8bit-g32", out=tmp_path / "o", parts="mtp", smoke=False, report=notes
    )
    assert not (tmp_path / "o" / MTP_FILE).exists()
    assert any("--parts mtp has no effect" in note for note in notes.said)
    job = prepare(str(model))
    unused = UnusedTensors({}, {"mtp.fc.weight": TensorInfo("F8_E4M3", (2, 2), 0, 4)})
    assert not unused.keeps_mtp("all")  # a tower is what that asks for
    assert "of their type they can't be copied" in remarks(unused, "all")[0]
    strange = {"mtp.fc.weight": TensorInfo("F8_E5M2", (2, 2), 0, 4)}
    assert find_unused([strange], job.source.config, job.inventory).mtp == strange
    with pytest.raises(MintError, match="leave it out with --parts text"):
        with_towers(job.inventory, strange)


@pytest.mark.slow
def test_mlx_vlm_computes_the_same_beside_them(tmp_path: Path) -> None:
    vlm = pytest.importorskip(
        "mlx_vlm.utils", reason="mlx-vlm is not a dependency: install it to run this"
    )
    model = source_of("qwen3_5_moe", tmp_path / "model")
    folder = convert.convert(
        str(model), uniform="8bit-g32", out=tmp_path / "all", parts="all", smoke=False
    ).path
    loaded = vlm.load_model(folder)
    loaded.set_dtype(mx.float32)
    difference = mx.abs(loaded.language_model(TOKENS).logits - logits(folder))
    assert difference.max().item() < 1e-4


@pytest.mark.slow
def test_mlx_optiq_finds_them(tmp_path: Path) -> None:
    patch = pytest.importorskip(
        "optiq.runtime.mtp.mtp_patch",
        reason="mlx-optiq is not a dependency: install it to run this",
    )
    model = source_of("qwen3_5_moe", tmp_path / "model")
    folder = convert.convert(
        str(model), uniform="8bit-g32", out=tmp_path / "q", parts="mtp", smoke=False
    ).path
    loaded, _ = mlx_lm.utils.load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    assert patch.inject_mtp_support(loaded, folder, config)
    stored: dict[str, mx.array] = mx.load(str(folder / MTP_FILE))  # type: ignore[assignment]
    head = dict(tree_flatten(loaded.parameters()))
    assert mx.array_equal(head["language_model.mtp.fc.weight"], stored["mtp.fc.weight"])
    assert mx.allclose(head["language_model.mtp.norm.weight"], stored["mtp.norm.weight"] + 1)


def test_the_doctor_sees_them_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    model = source_of("glm4_moe", tmp_path / "glm")
    hub.folder = convert.convert(
        str(model), uniform="8bit-g32", out=tmp_path / "q", parts="mtp", smoke=False
    ).path
    done = hub.run("doctor", "org/tiny")
    assert "nothing is wrong" in done.stdout, done.stdout + done.stderr
