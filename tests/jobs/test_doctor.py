"""The doctor finds each planted fault, and nothing in good checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from fake_hub import FakeHub
from helpers import Cli, Maker, llama, mixtral, qwen3_moe, write_checkpoint
from mlx_lm import convert as mlx_lm_convert
from quantized import checkpoint

from mint_mlx.base.errors import MintError
from mint_mlx.base.files import PLAN_FILE
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.doctor import doctor

PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours with a router; tests work on copies."""
    folder = tmp_path_factory.mktemp("doctor")
    source = str(write_checkpoint(folder / "model", qwen3_moe(2, experts=8)))
    return convert(source, "6bpw", folder / "good-6bpw", effort="fast", smoke=False).path


@pytest.fixture
def good(converted: Path, tmp_path: Path) -> Path:
    """A copy of `converted`."""
    return Path(shutil.copytree(converted, tmp_path / converted.name))


Config = dict[str, Any]
Weights = dict[str, mx.array]
Spoil = Callable[[Path], Any]


def edit_config(folder: Path, change: Callable[[Config], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    config["quantization_config"] = config["quantization"]
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[Weights], Any]) -> None:
    file = folder / "model.safetensors"
    weights = dict(mx.load(str(file)))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def config(change: Callable[[Config], Any]) -> Spoil:
    """Spoils a checkpoint's config."""
    return lambda folder: edit_config(folder, change)


def weights(change: Callable[[Weights], Any]) -> Spoil:
    """Spoils a checkpoint's weights."""
    return lambda folder: edit_weights(folder, change)


def table(change: Callable[[Config], Any]) -> Spoil:
    """Spoils the table of quantizations in the config."""
    return config(lambda c: change(c["quantization"]))


def entry(path: str, value: Any) -> Spoil:
    """Gives a layer an entry in that table."""
    return table(lambda t: t.update({path: value}))


def tensor(name: str, array: mx.array) -> Spoil:
    """Adds or replaces a tensor."""
    return weights(lambda w: w.update({name: array}))


def retype(name: str, dtype: mx.Dtype) -> Spoil:
    return weights(lambda w: w.update({name: w[name].astype(dtype)}))


def drop(*names: str) -> Spoil:
    return weights(lambda w: [w.pop(name) for name in names])


def requantize(path: str, bits: int) -> Spoil:
    """Gives a layer other codes than its config says."""

    def change(weights: Weights) -> None:
        w = mx.random.normal((8 if "gate" in path else 128, 128)).astype(mx.bfloat16)
        names = (f"{path}.weight", f"{path}.scales", f"{path}.biases")
        weights.update(zip(names, mx.quantize(w, 64, bits), strict=True))

    return lambda folder: edit_weights(folder, change)


def unquantize(folder: Path) -> None:
    """Leaves a layer out of the quantization, weights and config."""
    drop(f"{PROJ}.scales", f"{PROJ}.biases")(folder)
    tensor(f"{PROJ}.weight", mx.zeros((128, 128), mx.bfloat16))(folder)
    table(lambda t: t.pop(PROJ))(folder)


GOOD = {"group_size": 64, "bits": 6, "mode": "affine"}
SCALES = f"{PROJ}.scales"
# By fault: what spoils a checkpoint, and words of what the doctor says of it.
CONFIG_FAULTS: dict[str, tuple[Spoil, str]] = {
    "unknown layer": (entry("model.layers.9.mlp.up_proj", GOOD), "no such"),
    "unknown key": (entry(PROJ, GOOD | {"nmse": 0.1}), "reject"),
    "null group": (entry(PROJ, GOOD | {"group_size": None}), "null"),
    "bits as text": (entry(PROJ, GOOD | {"bits": "6"}), "not a whole number"),
    "refused but packed": (entry(PROJ, False), "says that it is unquantized"),
    "global mode null": (table(lambda t: t.update(mode=None)), "null for mode"),
    "no group size": (table(lambda t: t.pop("group_size")), "group_size"),
    "no entry, other global": (
        table(lambda t: (t.pop(PROJ), t.update(bits=2))),
        "config.json says 2bit",
    ),
    "no quantization at all": (config(lambda c: c.update(quantization=None)), "cannot load"),
    "tower without tensors": (config(lambda c: c.update(vision_config={"depth": 2})), "tower"),
    "heads without tensors": (
        config(lambda c: c.update(num_nextn_predict_layers=1)),
        "multi-token",
    ),
}
WEIGHT_FAULTS: dict[str, tuple[Spoil, str]] = {
    "other bits": (requantize(PROJ, 3), "its tensors are 3bit-g64"),
    "weak router": (requantize("model.layers.1.mlp.gate", 4), "router of 4 bits"),
    "left at 16 bits": (unquantize, "silently left"),
    "missing biases": (drop(f"{PROJ}.biases"), "no biases"),
    "missing weight": (drop(f"{PROJ}.weight"), "missing"),
    "float32 scales": (retype(SCALES, mx.float32), "float32 scales"),
    "scales of a strange type": (retype(SCALES, mx.int32), "fit no quantization"),
    "a norm missing": (drop("model.norm.weight"), "cannot load"),
    "a norm of another shape": (tensor("model.norm.weight", mx.zeros(3)), "cannot load"),
    "a tensor too many": (tensor("model.more", mx.zeros(3)), "cannot load"),
}
FILE_FAULTS: dict[str, tuple[Spoil, str]] = {
    "truncated": (lambda f: (f / "model.safetensors").open("r+b").truncate(9000), "truncated"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "a processor without a tower": (
        lambda f: (f / "preprocessor_config.json").write_text("{}"),
        "images",
    ),
}
FAULTS = CONFIG_FAULTS | WEIGHT_FAULTS | FILE_FAULTS


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_found(good: Path, fault: str) -> None:
    spoil, sign = FAULTS[fault]
    spoil(good)
    findings = doctor(str(good)).findings
    assert any(sign in f"{f.where} {f.problem}" for f in findings), findings
    assert len(findings) <= 2


def test_a_name_that_promises_other_bits(good: Path) -> None:
    for name in ("Model-4bit", "Model-8bit"):
        good = good.rename(good.with_name(name))
        assert f"says {name[-4:]}" in doctor(str(good)).findings[0].problem


def test_nothing_is_found_in_good_checkpoints(make: Maker, tmp_path: Path, good: Path) -> None:
    assert doctor(str(good)).findings == []
    convert(str(make(mixtral(1), "mixtral")), "5bpw", tmp_path / "ours-5bpw", smoke=False)
    assert doctor(str(tmp_path / "ours-5bpw")).findings == []
    source = make(llama(2), "llama")
    mlx_lm_convert(str(source), str(tmp_path / "theirs-4bit"), quantize=True, q_group_size=64)
    assert doctor(str(tmp_path / "theirs-4bit")).findings == []
    assert doctor(str(source)).findings == []

    # mlx_lm.awq says so of every module that it doesn't quantize.
    entries = {"model.norm": False, "model.layers.0.self_attn.rope": False}
    edit_config(tmp_path / "theirs-4bit", lambda config: config["quantization"].update(entries))
    edit_config(
        tmp_path / "theirs-4bit", lambda config: config["quantization_config"].update(entries)
    )
    assert doctor(str(tmp_path / "theirs-4bit")).findings == []
    with pytest.raises(MintError, match="an original"):
        doctor(str(tmp_path / "mixtral"))


def test_a_damaged_plan_is_one_of_the_things_that_are_wrong(good: Path) -> None:
    (good / PLAN_FILE).write_text("layers: [")
    assert any(PLAN_FILE in finding.problem for finding in doctor(str(good)).findings)


def test_a_scale_of_each_expert_is_an_entry_of_mlx_lm(tmp_path: Path) -> None:
    folder = checkpoint("mlx-nvfp4-gs", tmp_path / "model")
    assert not [f for f in doctor(str(folder)).findings if "global_scale" in f.problem]
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["model.layers.0.self_attn.k_proj"] = {
        "group_size": 16,
        "bits": 4,
        "mode": "nvfp4",
        "global_scale": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    wrong = [f for f in doctor(str(folder)).findings if "'global_scale'" in f.problem]
    assert [f.where for f in wrong] == ["model.layers.0.self_attn.k_proj"]


def test_the_exit_code_says_whether_something_is_wrong(cli: Cli, good: Path) -> None:
    for code, text in ((0, "nothing is wrong"), (1, "1 thing is wrong")):
        examined = cli("doctor", good)
        assert examined.code == code
        assert text in examined.out
        edit_config(good, lambda config: config["quantization"][PROJ].update(mode=None))


def test_the_doctor_knows_what_our_own_plan_keeps(hub: FakeHub, tmp_path: Path) -> None:
    """Also where another program downloaded all but the plan."""
    result = convert(str(hub.folder), "12bpw", tmp_path / "out", effort="fast", smoke=False)
    assert any(not config.quantized for config in result.plan.choice.values())
    hub.folder = result.path
    first = hub.run("doctor", "org/tiny")
    shutil.rmtree(hub.home / "hub")
    (hub.fill_cache() / "mint-plan.yaml").unlink()
    second = hub.run("doctor", "org/tiny")
    for done in (first, second):
        assert "nothing is wrong" in done.stdout, done.stdout + done.stderr


TOWER = {"vision.norm.weight": mx.ones((4,))}


@pytest.mark.parametrize("place", ["", "optiq"])
def test_files_that_mlx_optiq_puts_beside_a_model_are_known(
    hub: FakeHub, good: Path, place: str
) -> None:
    """Its towers and its blocks for multi-token prediction, which stock mlx-lm doesn't load."""
    (good / place).mkdir(exist_ok=True)
    mx.save_safetensors(str(good / place / "optiq_vision.safetensors"), TOWER)
    mx.save_safetensors(str(good / place / "mtp.safetensors"), {"mtp.fc.weight": mx.ones((4, 8))})
    mx.save_safetensors(str(good / "adapters.safetensors"), {"layers.0.lora_a": mx.ones((4, 8))})
    for name in ("optiq_metadata.json", "kv_config.json"):
        (good / name).write_text("{}")
    edit_config(good, lambda config: config.update(num_nextn_predict_layers=1))
    assert doctor(str(good)).findings == []

    # A tower that only mlx-optiq finds is told, as is one that nobody has.
    edit_config(good, lambda config: config.update(vision_config={"depth": 1}))
    (finding,) = doctor(str(good)).findings
    assert finding.problem.endswith(
        f"that lies in {Path(place, 'optiq_vision.safetensors')}, which mlx-optiq alone reads"
    )
    hub.folder = good
    examined = hub.run("doctor", "org/tiny", "--json")
    assert json.loads(examined.stdout)["findings"][0]["problem"] == finding.problem, examined.stderr
    (good / place / "optiq_vision.safetensors").unlink()
    (finding,) = doctor(str(good)).findings
    assert "no tensor belongs to one" in finding.problem
