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
from families import write_family
from helpers import Notes, RawTensors, edit_config, edit_weights, rewrite_shards
from released import known, released

from mint_mlx.base.errors import MintError
from mint_mlx.base.files import MTP_FILE
from mint_mlx.base.folders import CHECKPOINT
from mint_mlx.base.remove import known_files
from mint_mlx.base.safetensors_header import INDEX, TensorInfo, read_folder, read_header
from mint_mlx.checkpoint.mtp_codes import codes, linear_weights, with_coded_head
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


def test_packed_blocks_are_not_copied(tmp_path: Path) -> None:
    """As GPTQ packs them: nothing in a result's config.json would tell how."""
    folder = released("glm4_moe", tmp_path / "glm")
    blocks = prepare(str(folder)).unused.mtp
    name = next(n for n in blocks if n.endswith("q_proj.weight"))
    rows, columns = blocks[name].shape
    groups = columns // 32
    packed = {
        "qweight": ("I32", [columns // 8, rows]),
        "qzeros": ("I32", [groups, rows // 8]),
        "scales": ("F32", [groups, rows]),
    }

    def pack(tensors: RawTensors) -> None:
        if tensors.pop(name, None) is not None:
            stem = name.removesuffix("weight")
            tensors.update(
                {
                    stem + kind: (code, shape, bytes(4 * shape[0] * shape[1]))
                    for kind, (code, shape) in packed.items()
                }
            )

    rewrite_shards(folder, pack)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(MintError, match="are packed, and a result doesn't say how"):
        prepare(str(folder), parts="mtp")
    job = prepare(str(folder), parts="all")
    assert not job.inventory.carried
    assert "of their type they can't be copied" in " ".join(remarks(job.unused, "all"))


def weights_of(folder: Path) -> dict[str, mx.array]:
    """The head that a folder stores, as mlx-lm's classes name its weights, unquantized."""
    stored: dict[str, mx.array] = mx.load(str(folder / MTP_FILE))  # type: ignore[assignment]
    head: dict[str, mx.array] = {}
    for name, array in stored.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("experts.gate_up_proj") + "switch_mlp."
            gate, up = mx.split(array, 2, axis=1)
            head |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            head[name.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = array
        elif array.dtype == mx.uint32:
            scales, biases = (stored[name[:-6] + end] for end in ("scales", "biases"))
            head[name] = mx.dequantize(array, scales, biases, 64, 8)
        elif not name.endswith((".scales", ".biases")):
            head[name] = array
    return head


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_blocks_are_written_in_8_bits(tmp_path: Path, dtype: str | None) -> None:
    """In the one form that mlx-optiq and oMLX read: experts stacked, all linear layers alike."""
    model = source_of("qwen3_5_moe", tmp_path / "model")
    notes = Notes()
    more: dict[str, Any] = {"smoke": False, "dtype": dtype}
    result = convert.convert(
        str(model), "9bpw", tmp_path / "eight", parts="mtp-8bit", report=notes, **more
    )
    plain = convert.convert(str(model), "9bpw", tmp_path / "plain", parts="mtp", **more)
    assert any(f"are written into {MTP_FILE} in 8 bits" in note for note in notes.said)

    # The same weights but for their rounding, norms as they were, and all bytes counted.
    head, original = weights_of(result.path), weights_of(plain.path)
    assert head.keys() == original.keys() and len(head) > 10
    for name, array in head.items():
        if array.ndim == 1:
            assert mx.array_equal(array, original[name])
        assert array.dtype == original[name].dtype
        exact = original[name].astype(mx.float32)
        assert mx.square(array.astype(mx.float32) - exact).sum() < 1e-4 * mx.square(exact).sum()
    size = (result.path / MTP_FILE).stat().st_size
    assert size < 0.7 * (plain.path / MTP_FILE).stat().st_size
    files = sum(file.stat().st_size for file in result.path.glob("*.safetensors"))
    assert files == result.bytes <= 9 * result.inventory.parameters / 8
    assert result.inventory.parameters == plain.inventory.parameters

    # config.json says it in both ways, and stock mlx-lm loads what it would without the file.
    config = json.loads((result.path / "config.json").read_text())
    entry = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert config["mtplx_mtp_quantization"] == {**entry, "policy": "all", "prequantized": True}
    coded = {f"language_model.{path}" for path in result.inventory.coded}
    assert {p for p in config["quantization"] if ".mtp." in p} == coded
    assert all(config["quantization"][path] == entry for path in coded)
    assert doctor(str(result.path)).findings == []
    edited = tmp_path / "text.yaml"
    edited.write_text(
        (result.path / "mint-plan.yaml").read_text().replace("parts: mtp-8bit", "parts: text")
    )
    text = convert.convert(str(model), plan=edited, out=tmp_path / "text", **more)
    assert mx.array_equal(logits(result.path), logits(text.path))
    again = convert.convert(str(model), plan=result.path, out=tmp_path / "again", **more)
    assert (again.path / MTP_FILE).read_bytes() == (result.path / MTP_FILE).read_bytes()


def test_what_is_made_of_a_result_says_that_it_has_no_such_blocks(tmp_path: Path) -> None:
    """Their file lies beside the shards, where mlx-lm doesn't look."""
    model = source_of("qwen3_5_moe", tmp_path / "model")
    chosen: dict[str, Any] = {"uniform": "8bit-g32", "smoke": False}
    first = convert.convert(str(model), out=tmp_path / "first", parts="mtp-8bit", **chosen)
    notes = Notes()
    second = convert.convert(
        str(first.path),
        uniform="4bit-g32",
        out=tmp_path / "second",
        parts="mtp",
        smoke=False,
        report=notes,
    )
    assert any(f"in {MTP_FILE} are not read, and the result has none" in n for n in notes.said)
    assert not any("has no blocks for multi-token prediction" in note for note in notes.said)
    config = json.loads((second.path / "config.json").read_text())
    assert "mtplx_mtp_quantization" not in config
    assert not [path for path in config["quantization"] if ".mtp." in path]


def test_experts_apart_are_stacked_and_what_nobody_reads_is_refused(tmp_path: Path) -> None:
    def float_tensor(*shape: int, dtype: str = "BF16") -> TensorInfo:
        return TensorInfo(dtype, shape, 0, 0)

    apart = {f"mtp.layers.0.mlp.experts.{e}.up_proj.weight": float_tensor(8, 64) for e in (1, 0, 2)}
    (weight,) = linear_weights(apart).values()
    assert weight.shape == (3, 8, 64)
    assert weight.sources == tuple(sorted(apart))
    arrays = {name: mx.random.normal((8, 64)) for name in apart}
    made = codes(weight, "BF16", arrays.__getitem__)
    wanted = mx.stack([arrays[name] for name in sorted(apart)]).astype(mx.bfloat16)
    restored = mx.dequantize(made["weight"], made["scales"], made["biases"], 64, 8)
    assert mx.abs(restored - wanted).max() < 0.05

    inventory = prepare(str(released("llama", tmp_path / "llama"))).inventory
    qwen = {"model_type": "qwen3_5"}
    fp8 = {"mtp.fc.weight": float_tensor(8, 64, dtype="F8_E4M3")}
    for tensors, config, why in (
        (apart, {"model_type": "glm4_moe"}, "8 bits of Qwen3.5's blocks only.*--parts mtp keeps"),
        ({"mtp.fc.weight": float_tensor(8, 96)}, qwen, "96 columns.*--parts mtp keeps"),
        (fp8, qwen, "of type F8_E4M3.*--parts text leaves"),
    ):
        with pytest.raises(MintError, match=why):
            with_coded_head(inventory, tensors, config, None)
    model = source_of("glm4_moe", tmp_path / "glm")
    with pytest.raises(MintError, match="--parts mtp keeps"):
        convert.convert(str(model), "9bpw", tmp_path / "o", parts="mtp-8bit", smoke=False)


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
@pytest.mark.parametrize("parts", ["mtp", "mtp-8bit"])
def test_mlx_optiq_finds_them(tmp_path: Path, parts: str) -> None:
    """Its loader builds the head in the form that config.json states, and takes all of it."""
    runtime = pytest.importorskip(
        "optiq.runtime.mtp.runtime",
        reason="mlx-optiq is not a dependency: install it to run this",
    )
    model = source_of("qwen3_5_moe", tmp_path / "model")
    folder = convert.convert(
        str(model), uniform="4bit-g32", out=tmp_path / "q", parts=parts, smoke=False
    ).path
    loaded, _ = mlx_lm.utils.load_model(folder)
    attached = runtime.attach(loaded, None, folder).model
    modules = dict(attached.language_model.mtp.named_modules())
    assert hasattr(modules["fc"], "scales") == (parts == "mtp-8bit")

    # The same weights, of which norms have 1 added, as those of an original need.
    plain = tmp_path / "plain"
    convert.convert(str(model), uniform="4bit-g32", out=plain, parts="mtp", smoke=False)
    for name, array in weights_of(plain).items():
        path, _, local = name.removeprefix("mtp.").rpartition(".")
        module = modules[path]
        held = module[local]
        if hasattr(module, "scales"):
            held = mx.dequantize(held, module.scales, module.biases, module.group_size, module.bits)
        exact = array.astype(mx.float32) + (array.ndim == 1)
        error = mx.square(held.astype(mx.float32) - exact).sum()
        assert error < 1e-4 * mx.square(exact).sum(), name

    # It predicts.
    attached.set_dtype(mx.float32)
    hidden = mx.random.normal((1, TOKENS.shape[1], 64), key=mx.random.key(0))
    assert mx.isfinite(attached.mtp_forward(hidden, TOKENS)).all()


def test_the_doctor_sees_them_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    model = source_of("glm4_moe", tmp_path / "glm")
    hub.folder = convert.convert(
        str(model), uniform="8bit-g32", out=tmp_path / "q", parts="mtp", smoke=False
    ).path
    done = hub.run("doctor", "org/tiny")
    assert "nothing is wrong" in done.stdout, done.stdout + done.stderr


def test_a_block_that_the_class_does_not_drop_is_dropped(tmp_path: Path) -> None:
    """mlx-lm's DeepSeek-V3 drops block 61 alone, as the release has it."""
    folder = write_family(tmp_path / "model", "deepseek_v3")
    names = ("eh_proj.weight", "enorm.weight", "self_attn.o_proj.weight")
    extra = {f"model.layers.4.{name}": mx.ones((64, 128)) for name in names}
    edit_weights(folder, lambda weights: weights | extra)
    with pytest.raises(MintError, match=r"parameters not in model: model\.layers\.4\.eh_proj"):
        prepare(str(folder))
    edit_config(folder, num_nextn_predict_layers=1)
    assert prepare(str(folder)).unused.mtp.keys() == extra.keys()
    result = convert.convert(str(folder), uniform="keep", out=tmp_path / "out", smoke=False)
    assert not extra.keys() & mx.load(str(result.path / "model.safetensors")).keys()

    # A block without the projection that prediction begins with is one that config.json forgets.
    edit_weights(folder, lambda w: {n: a for n, a in w.items() if "eh_proj" not in n})
    with pytest.raises(MintError, match=r"parameters not in model: model\.layers\.4\."):
        prepare(str(folder))
