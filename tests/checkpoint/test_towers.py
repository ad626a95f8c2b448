"""Towers and multi-token-prediction blocks: dropped with their settings, or copied as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from helpers import Cli, Notes, order_for
from released import RELEASED, known, released

from mint_mlx.base.errors import MintError
from mint_mlx.base.safetensors_header import TensorInfo, read_folder
from mint_mlx.checkpoint.towers import find_unused, is_mtp, with_towers
from mint_mlx.checkpoint.vlm_keys import vision_keys
from mint_mlx.jobs import convert, dry_run
from mint_mlx.jobs.doctor import doctor
from mint_mlx.jobs.measurements import get_profile
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request

TOWERS = {"llama4": ("vision_model.", "multi_modal_projector."), "qwen3_5_moe": ("model.visual.",)}
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
MTP = {"deepseek_v3": "num_nextn_predict_layers", "glm4_moe": "num_nextn_predict_layers"}


def source(family: str, folder: Path) -> Path:
    """A released checkpoint with processor files."""
    if not known(family):
        pytest.skip("this mlx-lm has no such family")
    released(family, folder)
    for name in PROCESSORS:
        (folder / name).write_text('{"processor_class": "Processor"}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"processor_class": "Processor"})
    )
    return folder


def names(folder: Path) -> set[str]:
    return {name for table in read_folder(folder).values() for name in table}


def tensors(folder: Path, prefixes: tuple[str, ...]) -> dict[str, mx.array]:
    arrays: dict[str, Any] = {}
    for file in read_folder(folder):
        arrays |= mx.load(str(folder / file))  # type: ignore[arg-type]
    return {name: array for name, array in arrays.items() if name.startswith(prefixes)}


@pytest.mark.parametrize("family", TOWERS)
def test_a_text_model_says_nothing_of_its_tower(tmp_path: Path, family: str) -> None:
    model = source(family, tmp_path / family)
    convert.convert(str(model), "5bpw", tmp_path / "out", smoke=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    words = ("vision", "image", "video", "boi")
    said = {key for key in config if any(word in key for word in words)}
    assert said == vision_keys(config)  # Llama 4's class in mlx-vlm can't do without
    assert config["text_config"]
    assert config["model_type"] == family
    assert not [name for name in PROCESSORS if (tmp_path / "out" / name).exists()]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "processor_class" not in settings
    assert not [name for name in names(tmp_path / "out") if "vis" in name or "multi_modal" in name]
    assert doctor(str(tmp_path / "out")).findings == []


@pytest.mark.parametrize("family", TOWERS)
def test_all_parts_carry_the_tower_as_it_is(tmp_path: Path, family: str) -> None:
    model = source(family, tmp_path / family)
    whole = convert.convert(str(model), "9bpw", tmp_path / "whole", parts="all", smoke=False)

    # Its tensors, its config and the processors' files are all there, within the budget.
    before, after = tensors(model, TOWERS[family]), tensors(tmp_path / "whole", TOWERS[family])
    assert before.keys() == after.keys()
    assert len(before) > 20
    for name, array in before.items():
        assert array.dtype == after[name].dtype, name
        assert mx.array_equal(array, after[name]), name
    files = sum(f.stat().st_size for f in (tmp_path / "whole").glob("*.safetensors"))
    assert files == whole.bytes <= 9 * whole.inventory.parameters / 8
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert config["vision_config"] == original["vision_config"]
    assert all((tmp_path / "whole" / name).is_file() for name in PROCESSORS)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "mlx_vlm.generate --model whole --image" in card
    assert doctor(str(tmp_path / "whole")).findings == []

    # The plan remembers that the tower is there.
    plan = tmp_path / "whole" / "mint-plan.yaml"
    again = convert.convert(str(model), plan=plan, out=tmp_path / "again", smoke=False)
    assert again.bytes == whole.bytes
    assert again.plan.parts == "all"

    # It changes nothing for stock mlx-lm.
    edited = tmp_path / "text.yaml"
    edited.write_text(plan.read_text().replace("parts: all", "parts: text"))
    convert.convert(str(model), plan=edited, out=tmp_path / "text", smoke=False)
    tokens = mx.array(np.random.default_rng(0).integers(3, 96, (1, 16)))
    logits = []
    for folder in ("whole", "text"):
        loaded, _ = mlx_lm.utils.load_model(tmp_path / folder)
        loaded.set_dtype(mx.float32)
        logits.append(loaded(tokens))
    assert mx.array_equal(*logits)


@pytest.mark.parametrize("family", [*MTP, "qwen3_next"])
def test_blocks_for_multi_token_prediction_are_gone_from_the_config_too(
    tmp_path: Path, family: str
) -> None:
    model = source(family, tmp_path / family)
    config = json.loads((model / "config.json").read_text())
    assert any(is_mtp(name, config) for name in names(model))
    notes = Notes()
    convert.convert(str(model), "6bpw", tmp_path / "out", smoke=False, report=notes)
    assert any("multi-token prediction" in note for note in notes.said)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any(is_mtp(name, written) for name in names(tmp_path / "out"))
    if family in MTP:
        assert config[MTP[family]] == 1
        assert written[MTP[family]] == 0
    assert doctor(str(tmp_path / "out")).findings == []


def test_a_profile_of_other_parts_gives_the_true_size(cli: Cli, tmp_path: Path) -> None:
    """The cache holds one profile for text and tower; what is said before is what is written."""
    model = source("llama4", tmp_path / "llama4")
    get_profile(prepare(str(model)))
    order = order_for(Request(str(model), "5bpw", out=tmp_path / "out", parts="all"))
    _, promised = dry_run.dry_run(order)
    result = convert.carry_out(order, smoke=False)
    assert promised.profiled
    assert promised.bytes == result.bytes
    assert result.bytes == sum(f.stat().st_size for f in result.path.glob("*.safetensors"))
    inspected = cli("inspect", result.path, "--json")
    assert inspected.code == 0
    assert inspected.json["bits_per_weight"] == pytest.approx(result.bits_per_weight)
    assert doctor(str(result.path)).bits_per_weight == pytest.approx(result.bits_per_weight)


def test_parts_that_cannot_be(tmp_path: Path) -> None:
    model = released("llama", tmp_path / "llama")
    with pytest.raises(
        MintError, match=r"--parts must be text, mtp, mtp-8bit or all \(got vision\)"
    ):
        convert.convert(str(model), "5bpw", tmp_path / "out", parts="vision")

    # It has no tower to add, but a plan for all parts is not one for the text alone.
    convert.convert(str(model), "5bpw", tmp_path / "out", parts="all", smoke=False)
    plan = tmp_path / "out" / "mint-plan.yaml"
    with pytest.raises(MintError, match="the plan was made for --parts all"):
        convert.convert(str(model), plan=plan, out=tmp_path / "b", parts="text")


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.patch.weight",
        "patch_merge_mlp.linear_1.weight",
        "aligner.layers.0.weight",
        "model.visual.x.bias",
    ],
)
def test_what_belongs_to_a_tower(tmp_path: Path, name: str) -> None:
    inventory = prepare(str(released("llama", tmp_path / "llama"))).inventory
    table = {
        name: TensorInfo("BF16", (2,), 0, 4),
        "model.norm.weight": TensorInfo("BF16", (2,), 4, 8),
    }
    assert list(find_unused([table], {}, inventory).towers) == [name]


def test_a_tower_of_an_unknown_type_is_refused() -> None:
    headers = read_folder(RELEASED / "llama4").values()
    config = json.loads((RELEASED / "llama4" / "config.json").read_text())
    job = prepare(str(RELEASED / "llama4"))
    towers = find_unused(headers, config, job.inventory).towers
    name, info = next(iter(towers.items()))
    strange = {name: type(info)("F8_E5M2", info.shape, 0, 0)}
    with pytest.raises(MintError, match="cannot be copied as it is"):
        with_towers(job.inventory, strange)


def test_a_packed_tower_keeps_its_bits_and_is_counted_by_weights(tmp_path: Path) -> None:
    """mlx-vlm quantizes towers too; a result's own default says nothing of them."""

    def parameters(model: Path) -> int:
        job = prepare(str(model), parts="all")
        return job.unused.parameters(job.source.config)

    folder = source("qwen3_5_moe", tmp_path / "source")
    packed = tmp_path / "packed"
    convert.convert(str(folder), uniform="4bit-g32", parts="all", out=packed, smoke=False)
    before = parameters(packed)
    shard = next(packed.glob("model*.safetensors"))
    weights = mx.load(str(shard))
    matrices = [n for n in weights if ".visual." in n and weights[n].ndim == 2]
    name = next(n for n in matrices if weights[n].shape[-1] % 32 == 0)
    path = name.removesuffix(".weight")
    for kind, array in zip(
        ("weight", "scales", "biases"), mx.quantize(weights[name], 32, 8), strict=True
    ):
        weights[f"{path}.{kind}"] = array
    mx.save_safetensors(str(shard), weights, metadata={"format": "mlx"})
    config = json.loads((packed / "config.json").read_text())
    entry = {"bits": 8, "group_size": 32, "mode": "affine"}
    config["quantization"][path] = entry
    (packed / "config.json").write_text(json.dumps(config))

    assert parameters(packed) == before
    result = convert.convert(
        str(packed), uniform="3bit-g32", parts="all", out=tmp_path / "out", smoke=False
    )
    written = json.loads((result.path / "config.json").read_text())["quantization"]
    assert written["bits"] == 3
    assert written[path] == entry
    assert not [f for f in doctor(str(result.path)).findings if "no such" in f.problem]
