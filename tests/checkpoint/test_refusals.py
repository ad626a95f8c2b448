"""Each sentence that a source can cause and no other test does: what is wrong, and what to do.

The list of all `raise` in converters/sources, checkpoint and the readers of base was held against
the lines that the tests of these rooms run; what is here was left.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fake_hub import FakeHub
from helpers import (
    Maker,
    edit_config,
    edit_weights,
    llama,
    qwen3_moe,
    rewrite_shards,
    write_tokenizer,
)
from quantized import raw_tensor
from released import RELEASED, saved

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.mlxlm import sharded_model
from mint_mlx.checkpoint.row_reader import straight_layers
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.checkpoint.tokenizer import load_tokenizer
from mint_mlx.converters.sources.gguf import original_repo
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.model import prepare

Change = Callable[[Path], Any]
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def writes(name: str, text: str) -> Change:
    """A change of a folder: a file is written."""
    return lambda folder: (folder / name).write_text(text)


def says(**changes: Any) -> Change:
    """A change of config.json."""
    return lambda folder: edit_config(folder, **changes)


def holds(table: dict[str, Any], **tensors: tuple[str, np.ndarray]) -> Change:
    """A layer's weight gives way to tensors of a format that config.json states."""

    def change(folder: Path) -> None:
        def replace(shards: dict[str, Any]) -> None:
            del shards[f"{Q_PROJ}.weight"]
            for leaf, (code, values) in tensors.items():
                shards[f"{Q_PROJ}.{leaf}"] = raw_tensor(code, values)

        rewrite_shards(folder, replace)
        edit_config(folder, **table)

    return change


def stated(**table: Any) -> dict[str, Any]:
    return {"quantization_config": table}


def shard_of(name: str) -> Change:
    return writes(INDEX, json.dumps({"weight_map": {"model.norm.weight": name}}))


BYTES = ("U8", np.ones((64, 128)))
REAL = ("F32", np.ones((128, 2)))
WORDS = ("I32", np.ones((16, 128)))
# A change of a small Llama, and the whole sentence.
CASES: dict[str, tuple[Change, str]] = {
    "config.json that is a list": (
        writes("config.json", "[]"),
        r"config\.json in model is not a table: download it again",
    ),
    "architectures that are numbers": (
        says(architectures=[1]),
        r"architectures in model's config\.json is not a list of names: download it again",
    ),
    "a text model of no name": (
        says(text_config={"model_type": 1}),
        r"text_config\.model_type in model's config\.json is not a name: download it again",
    ),
    "no model_type": (
        says(model_type=None),
        r"config\.json has no model_type, so this is not a language model: give a checkpoint "
        "of one",
    ),
    "a nested quantization_config that is a list": (
        says(text_config={"model_type": "llama", "quantization_config": [1]}),
        r"quantization_config in model's config\.json is not a table: download it again",
    ),
    "a damaged file of ModelOpt's": (
        writes("hf_quant_config.json", "{"),
        r"hf_quant_config\.json in model is not valid: download it again",
    ),
    "a value of another type": (
        says(
            per_layer_config={"x": {}}, layer_types=["full_attention"] * 2, model_type="gemma4_text"
        ),
        r'config\.json holds a value that no model has \(per_layer_config is {"x": {}}\): '
        "download it again, or correct it",
    ),
    "positions of some layers": (
        says(
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={"sliding_attention": {"rope_theta": 5.0}},
        ),
        r'config\.json says rope_parameters is {"sliding_attention": {"rope_theta": 5.0}}, which '
        r"is not a table for each type of layer \(full_attention has none\): download it again, or "
        "correct it",
    ),
    "a theta inside the scaling": (
        says(rope_scaling={"rope_theta": 77.0, "rope_type": "default"}),
        r"config\.json says rope_scaling\.rope_theta is 77\.0, which mlx-lm's class llama does not "
        "read, so that mlx-lm would run another model: update mlx-lm and mint-mlx, or rename the "
        "key where the class reads it by another name",
    ),
    "a number in place of a list": (
        says(no_rope_layers=3),
        r"config\.json holds a value that no model has \(no_rope_layers is 3\): download it again, "
        "or correct it",
    ),
    "float64": (
        lambda folder: rewrite_shards(
            folder,
            lambda t: t.update({f"{Q_PROJ}.weight": ("F64", [128, 128], bytes(8 * 128 * 128))}),
        ),
        f"{Q_PROJ}.weight is in float64, which mint-mlx does not read: save it in bf16 or float32",
    ),
    "another number of tokens than rows": (
        says(vocab_size=90),
        r".*Expected shape \(90, 128\) but received shape \(96, 128\).* set vocab_size to 96 in "
        r"config\.json, if tokens were added or taken",
    ),
    "a number that is none": (
        says(rms_norm_eps=math.nan),
        r"config\.json says rms_norm_eps is NaN, which is not a number: download it again, or "
        "correct it",
    ),
    "null where the class needs a value": (
        says(num_key_value_heads=None, rms_norm_eps=None),
        r"mlx-lm cannot build a model from model: config\.json says null for .*rms_norm_eps: "
        "leave the keys out, or give their values",
    ),
    "attention to later tokens": (
        says(is_causal=False),
        r"config\.json says is_causal is false, which mlx-lm's class llama does not read: "
        "attention to later tokens is an embedding model's, and mlx-lm's classes have none; give a "
        "model that writes text",
    ),
    "an index of nothing": (
        writes(INDEX, "{}"),
        r"model\.safetensors\.index\.json in model is not a safetensors index: download it again",
    ),
    "an index of PyTorch files": (
        shard_of("pytorch_model.bin"),
        r"model\.safetensors\.index\.json names 'pytorch_model\.bin', which is not a safetensors "
        "file: give a checkpoint in safetensors",
    ),
    "MLX's layers with integers": (
        lambda folder: (
            rewrite_shards(
                folder,
                lambda t: t.update({f"{Q_PROJ}.weight": raw_tensor("I32", np.ones((128, 128)))}),
            ),
            edit_config(folder, quantization={"group_size": 64, "bits": 4}),
        ),
        f"{Q_PROJ} has weights of type I32, which no quantizer reads: give the checkpoint in bf16",
    ),
    "an MLX checkpoint that lost its quantization": (
        holds(
            {},
            weight=("U32", np.ones((128, 16))),
            scales=("F16", np.ones((128, 2))),
            biases=("F16", np.ones((128, 2))),
        ),
        f"{Q_PROJ}.weight is packed as in MLX checkpoints, but config.json has no `quantization`: "
        "download config.json again",
    ),
    "an MLX checkpoint that says so in the wrong place": (
        holds(
            {"quantization_config": {"group_size": 64, "bits": 4}},
            weight=("U32", np.ones((128, 16))),
            scales=("F16", np.ones((128, 2))),
            biases=("F16", np.ones((128, 2))),
        ),
        f"{Q_PROJ}.weight is packed as in MLX checkpoints, but config.json has no `quantization`: "
        "download config.json again",
    ),
    "groups that don't divide": (
        holds(
            stated(**GPTQ),
            qweight=("I32", np.ones((8, 128))),
            qzeros=("I32", np.ones((3, 16))),
            scales=("F16", np.ones((3, 128))),
        ),
        f"{Q_PROJ}.weight is GPTQ with 3 groups, which 64 columns do not fall into: give the "
        "original in bf16",
    ),
    "GPTQ with a tensor of another format": (
        holds(
            stated(**GPTQ),
            qweight=("I32", np.ones((8, 128))),
            qzeros=("I32", np.ones((2, 16))),
            scales=("F16", np.ones((2, 128))),
            SCB=("F32", np.ones(128)),
        ),
        f"{Q_PROJ}.weight is GPTQ, but with tensors that GPTQ doesn't have .SCB.: give the "
        "original in bf16",
    ),
    "metal of other groups": (
        holds(
            stated(quant_method="metal", bits=4, group_size=128),
            weight=("I32", np.ones((128, 8))),
            scales=REAL,
            qbiases=REAL,
        ),
        f"{Q_PROJ}.weight has codes of shape .128, 8. and biases of shape .128, 2., which is not "
        "that of metal with 4 bits in groups of 128: give the original in bf16",
    ),
    "gemma of other bits": (
        holds(
            stated(quant_method="gemma", num_bits=3),
            weight=("U8", np.ones((128, 32))),
            weight_scale=("F32", np.ones((128, 1))),
        ),
        f"{Q_PROJ}.weight is of gemma with 3 bits by config.json, not 2, 4 or 8: give the original "
        "in bf16",
    ),
    "gemma with damaged patterns": (
        holds(
            stated(quant_method="gemma", module_quant_configs={"(": {}}),
            weight=("U8", np.ones((128, 32))),
            weight_scale=("F32", np.ones((128, 1))),
        ),
        f"{Q_PROJ}.weight is of gemma, but module_quant_configs in config.json is damaged: give "
        "the original in bf16",
    ),
    "gemma with scales of other rows": (
        holds(
            stated(quant_method="gemma"),
            weight=("U8", np.ones((128, 32))),
            weight_scale=("F32", np.ones((64, 1))),
        ),
        f"{Q_PROJ}.weight has codes of type U8 and shape .128, 32. and scales of shape .64, 1., "
        "which is not that of gemma with 4 bits: give the original in bf16",
    ),
}
# Formats that are never read, with tensors as their tools name them.
NEVER: dict[str, tuple[str, dict[str, tuple[str, np.ndarray]], str]] = {
    "AQLM": (
        "aqlm",
        {
            "codes": ("I8", np.ones((16, 8, 1))),
            "codebooks": ("F16", np.ones((1, 256, 1, 8))),
            "scales": ("F16", np.ones((16, 1, 1, 1))),
        },
        "is (packed by|a tensor of) AQLM",
    ),
    "EETQ": (
        "eetq",
        {"weight": ("I8", np.ones((64, 128))), "weight_scales": ("F16", np.ones(128))},
        "is packed by EETQ",
    ),
    "compressed-tensors' sparse weights": (
        "compressed-tensors",
        {"compressed": ("F16", np.ones((128, 64))), "bitmask": ("U8", np.ones((128, 16)))},
        "is a tensor of compressed-tensors' sparse formats",
    ),
    "EXL2": (
        "exl2",
        {"q_weight": WORDS, "q_groups": ("I32", np.ones(4))},
        "is (packed by|a tensor of) EXL2",
    ),
    "FP-Quant": (
        "fp_quant",
        {"qweight": ("U8", np.ones((128, 32))), "scales": ("U8", np.ones((128, 2)))},
        "is packed by FP-Quant",
    ),
    "HIGGS": (
        "higgs",
        {"weight": ("I32", np.ones((32, 64))), "scales": ("F16", np.ones((128, 1)))},
        "is packed by HIGGS",
    ),
    "HQQ": ("hqq", {"W_q": BYTES, "scale": REAL, "zero": REAL}, "is a tensor of HQQ"),
    "SpQR": ("spqr", {"dense_weights": ("I64", np.ones(64))}, "is a tensor of SpQR"),
    "VPTQ": (
        "vptq",
        {"indices": ("I32", np.ones((1, 8, 64))), "perm": ("I64", np.arange(64))},
        "is a tensor of VPTQ",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_refusal_says_what_is_wrong_and_what_to_do(make: Maker, name: str) -> None:
    change, sentence = CASES[name]
    folder = make(llama(2))
    change(folder)
    with pytest.raises(MintError, match=f"^{sentence}$"):
        prepare(str(folder))


@pytest.mark.parametrize("name", NEVER)
def test_formats_that_are_never_read_are_called_by_their_names(make: Maker, name: str) -> None:
    method, tensors, sentence = NEVER[name]
    folder = make(llama(1))
    holds(stated(quant_method=method), **tensors)(folder)
    ending = ", which mint-mlx does not read: give the original in bf16$"
    with pytest.raises(MintError, match=sentence + ending):
        load_source(str(folder))


def test_marlins_order_is_called_by_its_name(make: Maker) -> None:
    folder = make(llama(1))
    says = stated(quant_method="gptq", bits=4, group_size=128, checkpoint_format="marlin")
    holds(says, B=("I32", np.ones((8, 256))), s=("F16", np.ones((1, 128))))(folder)
    with pytest.raises(MintError, match="in Marlin's order of codes, which mint-mlx does not read"):
        load_source(str(folder))


def test_null_for_an_empty_list_is_read_as_one(make: Maker) -> None:
    folder = make(qwen3_moe(1))
    edit_config(folder, mlp_only_layers=None)
    assert load_source(str(folder)).config["mlp_only_layers"] == []
    open_model(load_source(str(folder)))
    edit_config(folder, decoder_sparse_step=None)
    with pytest.raises(MintError, match="says null for decoder_sparse_step: leave the keys out"):
        open_model(load_source(str(folder)))


def test_a_missing_tensor_is_not_laid_at_the_door_of_a_null(make: Maker) -> None:
    folder = make(qwen3_moe(1))
    edit_config(folder, max_position_embeddings=None)
    open_model(load_source(str(folder)))
    edit_weights(folder, lambda w: {k: v for k, v in w.items() if "q_proj" not in k})
    with pytest.raises(MintError, match=r"Missing .*q_proj.*is the checkpoint complete"):
        open_model(load_source(str(folder)))


def test_a_file_in_place_of_a_folder_is_refused(make: Maker) -> None:
    with pytest.raises(MintError, match=r"is a file: give the folder that holds config\.json"):
        load_source(str(make(llama(1)) / "model.safetensors"))


def test_a_shard_that_ends_while_it_is_read_is_named(make: Maker) -> None:
    source = load_source(str(make(llama(1))))
    job = prepare(str(source.path))
    layer = job.inventory.layers[-1]
    straight = straight_layers(source, [layer])[layer.path]
    shard = source.path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(MintError, match="a shard was cut short while it was read: download it"):
        for rows in straight.chunks(4096):
            straight.load(source, layer, rows)


@pytest.mark.parametrize(("value", "sentence"), [(1e6, "float16 cannot hold"), (np.nan, "NaN or")])
def test_norms_are_looked_at_too(make: Maker, tmp_path: Path, value: float, sentence: str) -> None:
    folder = make(llama(1))
    large = mx.full((128,), value, dtype=mx.float32)
    edit_weights(folder, lambda weights: weights | {"model.norm.weight": large})
    with pytest.raises(MintError, match=rf"^model\.norm\.weight holds .*{sentence}"):
        convert(str(folder), uniform="4bit-g32", out=tmp_path / "out", dtype="float16")


def test_a_family_that_is_not_split_says_to_use_one_machine(tmp_path: Path) -> None:
    folder = saved(RELEASED / "drawn_5" / "recurrent_gemma", tmp_path / "model")
    write_tokenizer(folder)
    with pytest.raises(MintError, match=r"^mlx-lm cannot split model .*: run `eval` on one$"):
        sharded_model(folder)


def test_a_folder_without_a_tokenizer_can_not_be_scored(make: Maker) -> None:
    folder = make(llama(1))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(MintError, match=r"^model has no tokenizer .*: copy the files of the"):
        load_tokenizer(folder)


def test_a_gguf_name_without_end_names_nothing(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60)
    (tmp_path / "model.gguf").write_bytes(head + bytes(64))
    assert original_repo(tmp_path / "model.gguf") is None


def test_a_repository_whose_shards_lie_elsewhere_is_refused(hub: FakeHub) -> None:
    (hub.folder / "sub").mkdir()
    shard = next(hub.folder.glob("*.safetensors"))
    tensors = list(mx.load(str(shard)))
    for file in hub.folder.glob("*.safetensors*"):
        file.rename(hub.folder / "sub" / file.name)
    table = dict.fromkeys(tensors, f"sub/{shard.name}")
    (hub.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    done = hub.run("inspect", "org/tiny")
    assert done.returncode == 1, done.stderr
    assert "which is not a plain file name: refused, get the checkpoint from" in done.stderr
