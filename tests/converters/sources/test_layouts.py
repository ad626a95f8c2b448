"""Sources that are quantized already: read as their formulas say, faulty ones refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from formulas import bf16, raw, weight
from helpers import (
    Maker,
    Notes,
    edit_config,
    llama,
    order_for,
    qwen3_moe,
    rewrite_shards,
)
from mlx.utils import tree_flatten
from quantized import INT4
from released import RELEASED, known, released

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP, QuantConfig
from mint_mlx.base.safetensors_header import read_header
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.converters.sources.layouts import find_packed
from mint_mlx.jobs import convert
from mint_mlx.jobs.request import Request


def test_int4_is_code_minus_eight_times_scale() -> None:
    folder = RELEASED / "kimi_k2"
    wanted = []
    for expert in range(8):
        base = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        packed = raw(folder, f"{base}_packed").view(np.uint32)
        codes = packed[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        groups = codes.reshape(64, 2, 32).astype(np.float32)
        wanted.append(bf16((groups - 8) * raw(folder, f"{base}_scale")[..., None]).reshape(64, 64))
    experts = weight(folder, "model.layers.1.mlp.switch_mlp.up_proj")
    np.testing.assert_array_equal(experts, np.stack(wanted))


@pytest.mark.parametrize(
    "config", ["2bit-g32", "3bit-g64", "4bit-g64", "5bit-g32", "6bit-g64", "8bit-g32"]
)
def test_mlx_layers_are_code_times_scale_plus_bias(
    make: Maker, tmp_path: Path, config: str
) -> None:
    bits, group = int(config[0]), int(config.rpartition("g")[2])
    convert.convert(str(make(llama(1))), uniform=config, out=tmp_path / "q", smoke=False)
    base = "model.layers.0.mlp.gate_proj"
    packed, scales, biases = (
        raw(tmp_path / "q", f"{base}.{name}") for name in ("weight", "scales", "biases")
    )

    # Codes follow each other without a gap, the lowest bit first.
    stream_of_bits = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")
    digits = stream_of_bits.reshape(len(packed), -1, bits) << np.arange(bits, dtype=np.uint8)
    groups = digits.sum(-1).reshape(len(packed), -1, group).astype(np.float32)
    wanted = bf16(groups * scales[..., None] + biases[..., None]).reshape(len(packed), -1)
    np.testing.assert_array_equal(weight(tmp_path / "q", base), wanted)


@pytest.mark.parametrize("family", ["gpt_oss", "kimi_k2"])
def test_layers_that_stay_as_they_are_keep_their_bytes(tmp_path: Path, family: str) -> None:
    folder = released(family, tmp_path / family)
    result = convert.convert(str(folder), "8bpw", tmp_path / "out", smoke=False)
    stored = {layer.path: layer.stored for layer in result.inventory.layers if layer.stored}
    assert stored
    assert all(result.plan.choice[path] == config for path, config in stored.items())
    assert all(result.plan.errors[path].worst == 0 for path in stored)

    before = dict(tree_flatten(open_model(load_source(str(folder))).parameters()))
    after = dict(tree_flatten(open_model(load_source(str(tmp_path / "out"))).parameters()))
    for path in stored:
        for name in ("weight", "scales"):
            assert mx.array_equal(before[f"{path}.{name}"], after[f"{path}.{name}"])


def test_a_smaller_budget_takes_bits_from_quantized_layers(tmp_path: Path) -> None:
    folder = released("gpt_oss", tmp_path / "gpt_oss")
    result = convert.convert(str(folder), "4bpw", tmp_path / "out", smoke=False)
    assert result.bytes <= 4 * result.inventory.parameters / 8
    layers = [layer for layer in result.inventory.layers if layer.stored]
    assert any(result.plan.choice[layer.path] != layer.stored for layer in layers)

    # None costs more than its source's and loses all the same.
    for layer in layers:
        config = result.plan.choice[layer.path]
        assert config == layer.stored or layer.bytes(config) < layer.bytes(layer.stored)


def test_keep_means_sixteen_bits_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = released("gpt_oss", tmp_path / "gpt_oss")
    path = "model.layers.0.mlp.experts.down_proj"
    more = {"overrides": [f"{path}=keep"], "smoke": False}
    result = convert.convert(str(folder), "8bpw", tmp_path / "out", **more)
    assert result.plan.choice[path] == KEEP
    np.testing.assert_array_equal(weight(tmp_path / "out", path), weight(folder, path))


def test_an_mlx_checkpoint_is_a_source_too(make: Maker, tmp_path: Path) -> None:
    convert.convert(str(make(qwen3_moe(2))), uniform="6bit-g64", out=tmp_path / "six", smoke=False)
    result = convert.convert(str(tmp_path / "six"), "6bpw", tmp_path / "five", smoke=False)
    assert result.bytes <= 6 * result.inventory.parameters / 8
    same = [path for path, config in result.plan.choice.items() if config == QuantConfig(6, 64)]
    assert same
    assert len(same) < len(result.plan.choice)
    router = next(layer for layer in result.inventory.layers if layer.role == "router")
    assert result.plan.choice[router.path] == KEEP  # four outputs: slow when quantized


def _config(**layout: Any) -> dict[str, Any]:
    return {"quantization_config": layout}


LEFT_OVER = {
    "GPTQ": _config(quant_method="gptq", bits=4),
    "AWQ": _config(quant_method="awq", bits=4),
    "ModelOpt": _config(quant_method="modelopt", quant_algo="NVFP4"),
    "bitsandbytes": _config(quant_method="bitsandbytes", load_in_4bit=True),
    "FP8": _config(quant_method="fp8", weight_block_size=[64, 64]),
    "compressed-tensors": _config(
        quant_method="compressed-tensors",
        format="pack-quantized",
        config_groups={"g": {"weights": INT4}},
    ),
    "MXFP8": _config(quant_method="mxfp8"),
    "HQQ": _config(quant_method="hqq"),
    "something new": _config(quant_method="something-new"),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_a_config_that_no_tensor_bears_out_is_a_note(make: Maker, name: str) -> None:
    folder = make(qwen3_moe(1))
    before = dict(tree_flatten(open_model(load_source(str(folder))).parameters()))
    edit_config(folder, **LEFT_OVER[name])
    notes = Notes()
    order_for(Request(str(folder), budget="5bpw"), notes)
    assert any("none of its weights is packed" in note for note in notes.said)
    after = dict(tree_flatten(open_model(load_source(str(folder))).parameters()))
    assert all(mx.array_equal(before[n], after[n]) for n in before)
    assert before.keys() == after.keys()


UP = "model.layers.0.mlp.experts.3.up_proj.weight"
SPOILT = {
    "without scales": (
        lambda t: t.pop(f"{UP}_scale_inv"),
        "experts.3.up_proj.weight is FP8, but has no scales",
    ),
    "scales that are integers": (
        lambda t: t.update({f"{UP}_scale_inv": ("I32", [1, 1], bytes(4))}),
        "scales of type I32",
    ),
    "scales of other blocks": (
        lambda t: t.update({f"{UP}_scale_inv": ("F32", [2, 2], bytes(16))}),
        "not that of FP8 in blocks of 128x128",
    ),
    "another type": (lambda t: t.update({UP: ("F8_E5M2", *t[UP][1:])}), "is of type F8_E5M2"),
    "a norm": (
        lambda t: t.update({"model.norm.weight": ("F8_E4M3", [64], bytes(64))}),
        "model.norm.weight is FP8, but has no scales",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_fp8_that_would_be_read_wrongly_is_refused(tmp_path: Path, fault: str) -> None:
    change, message = SPOILT[fault]
    folder = rewrite_shards(released("qwen3_moe_fp8", tmp_path / "model"), change)
    with pytest.raises(MintError, match=re.escape(message)):
        convert.convert(str(folder), "5bpw")


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2"])
def test_families_that_read_fp8_themselves_are_checked_too(tmp_path: Path, family: str) -> None:
    folder = released(family, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [32, 32]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MintError, match="FP8 in blocks of 32x32"):
        convert.convert(str(folder), "5bpw")


def test_fp8_that_config_says_nothing_of_is_refused(tmp_path: Path) -> None:
    folder = released("qwen3_moe_fp8", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MintError, match=r"config\.json says nothing"):
        convert.convert(str(folder), "5bpw")


def test_float32_scales_of_an_mlx_checkpoint_become_bfloat16(make: Maker, tmp_path: Path) -> None:
    convert.convert(str(make(llama(1))), uniform="4bit-g64", out=tmp_path / "four", smoke=False)
    file = tmp_path / "four" / "model.safetensors"
    tensors = dict(mx.load(str(file)))  # type: ignore[arg-type]
    mx.eval(tensors)
    wide = {n: a.astype(mx.float32) if n.endswith(".scales") else a for n, a in tensors.items()}
    mx.save_safetensors(str(file), wide, metadata={"format": "mlx"})
    notes = Notes()
    result = convert.convert(
        str(tmp_path / "four"), "4.7bpw", tmp_path / "out", smoke=False, report=notes
    )
    assert any("layers of four are float32: they are written in 16 bits" in n for n in notes.said)
    after = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for layer in result.inventory.layers:
        if result.plan.choice[layer.path] == layer.stored:
            assert mx.array_equal(after[(f"{layer.path}.scales")], tensors[f"{layer.path}.scales"])  # type: ignore[index]
    assert not [n for n, a in after.items() if a.dtype == mx.float32]  # type: ignore[union-attr]


def test_a_nested_quantization_config_is_gone_afterwards(tmp_path: Path) -> None:
    folder = released("qwen3_5_moe", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    layout = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["text_config"]["quantization_config"] = layout
    (folder / "config.json").write_text(json.dumps(config))
    convert.convert(str(folder), "5bpw", tmp_path / "out", smoke=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written["text_config"]


def test_fp8_is_said_aloud(tmp_path: Path) -> None:
    if not known("minimax_m2"):
        pytest.skip("this mlx-lm has no such family")
    notes = Notes()
    order_for(Request(str(released("minimax_m2", tmp_path / "m")), budget="5bpw"), notes)
    assert any("is FP8 in blocks of 128x128" in note for note in notes.said)
    order_for(Request(str(released("gpt_oss", tmp_path / "g")), budget="5bpw"), notes)
    already = [note for note in notes.said if "is quantized already: 6 of 18 layers" in note]
    assert any("mxfp4" in note for note in already)


def test_tensors_of_other_shapes_are_refused_or_read() -> None:
    """Each format's tensors with a dimension more or less, or of another type."""
    refusals = set()
    for folder in sorted((RELEASED / "quantized").iterdir()):
        config = json.loads((folder / "config.json").read_text())
        file = "tensors.safetensors"
        table = read_header(folder / file)[0]
        for name, info in list(table.items())[:40]:
            for other in (
                replace(info, shape=info.shape[1:]),
                replace(info, shape=(*info.shape, 2)),
                replace(info, dtype="BOOL"),
            ):
                try:
                    find_packed(config, folder, {file: {**table, name: other}})
                except MintError as error:
                    refusals.add(str(error))
    assert len(refusals) > 50
    assert all(": give " in text or ": download " in text for text in refusals)
