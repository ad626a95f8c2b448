"""Tensors that quantization tools wrote are read as the tool itself dequantizes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from formulas import bf16, e4m3, raw, weight
from helpers import Notes
from mlx_lm.utils import load_model
from quantized import NAMES, checkpoint, difference, products, truth

from mint_mlx.allocation.allocate import uniform
from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.base.quant_config import KEEP, NVFP4_GLOBAL, NVFP4_LARGEST
from mint_mlx.checkpoint.layers import Layer
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import prepare

REFUSED = "mo-int4awq"
# Beyond one rounding to bfloat16. What a tool computes itself may be rounded otherwise.
ONCE = 1e-6
ROUNDED = {
    "ar-mfree-asym": 1.5e-2,
    "bnb-int8": 2e-3,
    "gm-act": 3e-3,
    "hf-bitnet": 2e-3,
    "mlx-nvfp4-gs": 2e-3,
    "mo-fp8pc": 3e-3,
    "mo-nvfp4": 3e-3,
}
# What each layer of the format becomes in MLX; a model's other layers are not quantized.
STAY = {
    "ar-awq": {"4bit-g128"},
    "ar-gptq-asym": {"4bit-g128"},
    "ar-gptq-sym": {"4bit-g128"},
    "ar-mfree-asym": {"4bit-g128", "4bit-g64"},
    "ar-round-asym": {"4bit-g128"},
    "cli-mixed": {"3bit-g64"},  # whose config.json says null for the groups
    "ct-MIX": {"4bit-g32"},
    "ct-MXFP4": {"mxfp4"},
    "ct-MXFP8": {"mxfp8"},
    "ct-W3A16-g32": {"3bit-g32"},
    "ct-W4A16": {"4bit-g128"},
    "ct-W4A16_ASYM": {"4bit-g128"},
    "ct-W8A16": {"8bit-g128"},
    "ct20-MXFP6": {"8bit-g32"},
    "ct20-W4-blocks": {"4bit-g64"},
    "ct20-W7-W8": {"8bit-g32"},
    "hf-bitnet": {"2bit-g64", "2bit-g128"},
    "hf-bitnet-auto": {"2bit-g64", "2bit-g128"},
    "hf-gemma": {"2bit-g128", "4bit-g128", "8bit-g128"},
    "hf-metal": {"4bit-g64"},
    "mo-mxfp8": {"mxfp8"},
}


def read(folder: Path, name: str) -> np.ndarray:
    """A weight by its name in the source, as profile and convert see it."""
    expert = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
    if expert:
        return weight(folder, f"{expert[1]}.switch_mlp.{expert[3]}")[int(expert[2])]
    return weight(folder, name.removesuffix(".weight"))


@pytest.mark.parametrize("name", [n for n in NAMES if truth(n) and n != REFUSED])
def test_weights_are_those_of_the_tool(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / "model")
    for tensor, expected in truth(name).items():
        got = products(read(folder, tensor))
        assert difference(got, expected) <= ROUNDED.get(name, ONCE), tensor


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (REFUSED, "mlx-nvfp4-gs")])
def test_codes_that_mlx_has_stay(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / "model")
    layers = prepare(str(folder)).inventory.layers
    assert {str(layer.stored) for layer in layers if layer.stored} == STAY.get(name, set())


@pytest.mark.parametrize("name", sorted(STAY))
def test_what_stays_is_loaded_by_stock_mlx_lm(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / "model")
    result = convert.convert(str(folder), "16bpw", tmp_path / "out", smoke=False)
    stored = [layer for layer in result.inventory.layers if layer.stored]
    assert stored
    assert all(result.plan.choice[layer.path] == layer.stored for layer in stored)
    load_model(tmp_path / "out")

    # Biases are rounded to 16 bits, unless the zero is in the middle; the codes stay.
    allowed = 8e-3 if "asym" in name.lower() or name == "ar-awq" else 0
    for layer in stored:
        before, after = weight(folder, layer.path), weight(tmp_path / "out", layer.path)
        assert difference(products(after), products(before)) <= allowed
        assert mx.array_equal(_codes(folder, layer), _codes(tmp_path / "out", layer))


@pytest.mark.parametrize("name", ["ct-NVFP4A16", "mlx-nvfp4-gs"])
def test_experts_of_nvfp4_stay_packed_where_that_is_asked_for(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / "model")
    options = {"out": tmp_path / "out", "keep_nvfp4": True, "smoke": False}
    result = convert.convert(str(folder), uniform="keep", **options)
    kept = {p for p, config in result.plan.choice.items() if config == NVFP4_GLOBAL}
    packed = ("gate", "up", "down") if name == "mlx-nvfp4-gs" else ("gate", "down")
    assert kept == {f"model.layers.0.mlp.switch_mlp.{n}_proj" for n in packed}

    # Stock mlx-lm loads them, with the number of each expert times 2688, and the same bytes.
    model, config = load_model(tmp_path / "out")
    for path in kept:
        module = dict(model.named_modules())[path]
        assert config["quantization"][path] == NVFP4_GLOBAL.as_mlx()
        if name == "mlx-nvfp4-gs":
            assert mx.array_equal(module.global_scale, raw(folder, f"{path}.global_scale"))
        else:
            expert = path.replace("switch_mlp", "experts.1")
            assert float(module.global_scale[1]) == pytest.approx(
                NVFP4_LARGEST / float(raw(folder, f"{expert}.weight_global_scale")[0])
            )
            codes = np.array(module.weight[1]).view(np.uint8)
            np.testing.assert_array_equal(codes, raw(folder, f"{expert}.weight_packed"))

    # Here they are run dequantized, as the source is.
    for path in kept:
        np.testing.assert_array_equal(weight(tmp_path / "out", path), weight(folder, path))


def test_layers_that_mlx_cannot_run_packed_are_dequantized(tmp_path: Path) -> None:
    folder, notes = checkpoint("mo-nvfp4", tmp_path / "model"), Notes()
    options = {"out": tmp_path / "out", "keep_nvfp4": True, "smoke": False, "report": notes}
    result = convert.convert(str(folder), uniform="keep", **options)
    assert set(result.plan.choice.values()) == {KEEP}
    assert any("no layer holds NVFP4" in note for note in notes.said)
    with pytest.raises(UsageError, match="makes no codes of nvfp4-global"):
        convert.convert(str(folder), uniform="nvfp4-global")


def _codes(folder: Path, layer: Layer) -> mx.array:
    from mint_mlx.checkpoint.mlxlm import build_model

    modules = dict(build_model(folder).named_modules())
    return modules[layer.path].weight


@pytest.mark.parametrize("name", ["ar-gptq-asym", "ar-gptq-sym", "ar-round-asym", "ar-awq"])
def test_zero_points_by_the_formula(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / "model")
    base = "model.layers.0.self_attn.k_proj"
    words, zeros, scales = (
        raw(folder, f"{base}.{part}") for part in ("qweight", "qzeros", "scales")
    )
    shifts = np.arange(8, dtype=np.uint32) * 4
    if name == "ar-awq":
        shifts = shifts[[0, 4, 1, 5, 2, 6, 3, 7]]
        codes = (words.view(np.uint32)[..., None] >> shifts & 15).reshape(len(words), -1)
    else:
        by_word = words.view(np.uint32)[:, None] >> shifts[:, None] & 15
        codes = by_word.reshape(-1, words.shape[1])
    zero = (zeros.view(np.uint32)[..., None] >> shifts & 15).reshape(len(zeros), -1)
    zero = zero + name.startswith("ar-gptq")
    per_row = len(codes) // len(scales)
    scale = np.repeat(scales.astype(np.float32), per_row, 0)
    exact = (codes.astype(np.float32) - np.repeat(zero.astype(np.float32), per_row, 0)) * scale
    expected = exact.T.astype(np.float16 if name == "ar-awq" or "gptq" in name else np.float32)
    if name == "ar-round-asym":
        expected = bf16(expected)
    np.testing.assert_array_equal(weight(folder, base), expected.astype(np.float32))


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    folder = checkpoint("fg-fp8-128-ue8m0", tmp_path / "model")
    base = "model.layers.0.mlp.down_proj"
    exponents = raw(folder, f"{base}.weight_scale_inv").astype(np.float32)
    scales = np.repeat(np.repeat(2.0 ** (exponents - 127), 128, 0), 128, 1)
    expected = bf16(e4m3(raw(folder, f"{base}.weight")) * scales)
    np.testing.assert_array_equal(weight(folder, base), expected)


def test_modelopt_awq_is_refused_by_its_reason(tmp_path: Path) -> None:
    folder = checkpoint(REFUSED, tmp_path / "model")
    (folder / "README.md").write_text("---\nbase_model: org/original\n---\n")
    with pytest.raises(MintError, match=r"pre_quant_scale.*give org/original"):
        convert.convert(str(folder), "5bpw")


def test_a_modelopt_file_beside_the_config_is_enough(tmp_path: Path) -> None:
    folder = checkpoint("mo-nvfp4", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert (folder / "hf_quant_config.json").is_file()
    for tensor, expected in truth("mo-nvfp4").items():
        assert difference(products(read(folder, tensor)), expected) < 3e-3


def test_what_older_tools_write_beside_the_config_is_enough(tmp_path: Path) -> None:
    folder = checkpoint("gm-act", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    table = config.pop("quantization_config")
    del table["quant_method"]  # AutoGPTQ's own file has none
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(table))
    for tensor, expected in truth("gm-act").items():
        assert difference(products(read(folder, tensor)), expected) < 3e-3
    result = convert.convert(str(folder), "16bpw", tmp_path / "out", smoke=False)
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert all(layer.stored is None for layer in result.inventory.layers)


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("ct-W4A16", True),
        ("ct-W4A16_ASYM", False),
        ("ar-gptq-sym", True),
        ("ar-gptq-asym", False),
        ("ar-awq", False),
        ("ct-MXFP4", True),
    ],
)
def test_keep_unpacks_what_biases_of_16_bits_would_round(
    name: str, stays: bool, tmp_path: Path
) -> None:
    job = prepare(str(checkpoint(name, tmp_path / "model")))
    choice = uniform(job.source, job.inventory, KEEP, {}).choice
    assert any(config.quantized for config in choice.values()) == stays
