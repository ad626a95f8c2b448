"""Weights on a grid keep its codes at every level of effort, unless rtn is asked for by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import Cli, Maker, Notes, llama, order_for, qwen3_moe

from mint_mlx.base.quant_config import QuantConfig, parse_config
from mint_mlx.jobs import measurements
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.dry_run import dry_run
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request
from mint_mlx.measure.profile import without_grids
from mint_mlx.measure.profile_file import load_profile, save_profile

CONFIG = "4bit-g64"
GRID = QuantConfig(4, 64)
FILE = "model.safetensors"


def put_on_grid(folder: Path, config: str = CONFIG) -> Path:
    """The folder, with what `mlx_lm.convert -d` would make of its quantized copy."""
    c = parse_config(config)
    tensors = mx.load(str(folder / FILE))
    for name, weight in tensors.items():
        if weight.ndim > 1:
            packed = mx.quantize(weight, c.group_size, c.bits)
            tensors[name] = mx.dequantize(*packed, group_size=c.group_size, bits=c.bits)
    mx.save_safetensors(str(folder / FILE), tensors, metadata={"format": "pt"})
    return folder


def make_ternary(folder: Path) -> Path:
    """The folder, with weights of -g, 0 and g."""
    rng = np.random.default_rng(0)
    tensors = mx.load(str(folder / FILE))
    for name, weight in tensors.items():
        if weight.ndim > 1:
            scale = mx.array(rng.uniform(0.01, 0.1, (weight.shape[0], 1))).astype(mx.bfloat16)
            tensors[name] = mx.array(rng.integers(-1, 2, weight.shape)).astype(mx.bfloat16) * scale
    mx.save_safetensors(str(folder / FILE), tensors, metadata={"format": "pt"})
    return folder


def restored(folder: Path) -> dict[str, mx.array]:
    """The weights that a checkpoint's codes mean, by the name of the weight."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= mx.load(str(file))
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    weights = {}
    for name in [name for name in tensors if name.endswith(".scales")]:
        path = name.removesuffix(".scales")
        entry = quantization.get(path, quantization)
        weights[f"{path}.weight"] = mx.dequantize(
            tensors[f"{path}.weight"],
            tensors[name],
            tensors.get(f"{path}.biases"),
            entry["group_size"],
            entry["bits"],
            entry["mode"],
        )
    return weights


def check_exact(source: Path, result: Path) -> None:
    """Every quantized layer means the source's weights, to the bit."""
    exact = mx.load(str(source / FILE))
    weights = restored(result)
    assert weights
    for name, weight in weights.items():
        expected = exact.get(name)
        if expected is None:  # experts, which the source stores one by one
            block, _, rest = name.partition(".switch_mlp.")
            experts = range(weight.shape[0])
            expected = mx.stack([exact[f"{block}.experts.{e}.{rest}"] for e in experts])
        assert mx.array_equal(weight, expected), name


@pytest.mark.parametrize("model", [llama(1), qwen3_moe(1)], ids=["llama", "qwen3_moe"])
def test_uniform_takes_the_codes_that_are_there(make: Maker, tmp_path: Path, model: Any) -> None:
    source = put_on_grid(make(model))
    convert(str(source), out=tmp_path / "out", uniform=CONFIG, smoke=False)
    check_exact(source, tmp_path / "out")

    # Neither more bits nor error feedback change that.
    convert(str(source), out=tmp_path / "more", uniform="6bit-g32", smoke=False)
    check_exact(source, tmp_path / "more")


@pytest.mark.parametrize("quantizer", ["search-gptq", "search-gptaq", "learn"])
def test_quantizers_leave_the_codes_alone(make: Maker, tmp_path: Path, quantizer: str) -> None:
    source = put_on_grid(make(llama(1)))
    convert(
        str(source),
        out=tmp_path / "out",
        uniform=CONFIG,
        quantizer=quantizer,
        tokens=1024,
        smoke=False,
    )
    check_exact(source, tmp_path / "out")


def test_rtn_by_name_is_mx_quantize(make: Maker, tmp_path: Path) -> None:
    source = put_on_grid(make(llama(1)))
    out = tmp_path / "out"
    convert(str(source), out=out, uniform=CONFIG, quantizer="rtn", smoke=False)
    exact = mx.load(str(source / FILE))
    written = mx.load(str(out / FILE))
    for name in [name for name in written if name.endswith(".scales")]:
        path = name.removesuffix(".scales")
        packed = mx.quantize(exact[f"{path}.weight"], 64, 4)
        for kind, array in zip(("weight", "scales", "biases"), packed, strict=True):
            assert mx.array_equal(written[f"{path}.{kind}"], array), f"{path}.{kind}"


def test_ternary_weights_are_exact_in_two_bits(make: Maker, tmp_path: Path) -> None:
    source = make_ternary(make(llama(1)))
    convert(str(source), out=tmp_path / "out", uniform="2bit-g64", smoke=False)
    check_exact(source, tmp_path / "out")


def test_a_budget_is_spent_with_the_errors_that_grids_have(make: Maker, tmp_path: Path) -> None:
    source = put_on_grid(make(llama(1)))
    notes = Notes()
    result = convert(
        str(source), "5bpw", tmp_path / "out", effort="fast", smoke=False, report=notes
    )
    assert any("a 4-bit grid of 64" in note for note in notes.said)
    for config in result.plan.choice.values():
        assert config == GRID
    assert all(error.mean == 0 for error in result.plan.errors.values())
    check_exact(source, tmp_path / "out")

    # A plan that stands beside the result makes the same bytes again.
    convert(
        str(source), plan=tmp_path / "out" / "mint-plan.yaml", out=tmp_path / "again", smoke=False
    )
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()

    # rtn by name is planned with the errors of mx.quantize.
    request = Request(str(source), budget="5bpw", effort="fast", quantizer="rtn")
    plan, _ = dry_run(order_for(request))
    assert all(error.mean > 0 for error in plan.errors.values())


def test_a_profile_keeps_both_errors(make: Maker, tmp_path: Path) -> None:
    job = prepare(str(put_on_grid(make(llama(1)))))
    profile = measurements.get_profile(job)
    save_profile(profile, tmp_path / "p.json")
    loaded = load_profile(tmp_path / "p.json")
    plain = without_grids(loaded)
    for path, curve in loaded.curves.items():
        assert curve.grids == (GRID,)
        assert float(curve.of(GRID).max()) == 0
        assert float(curve.of(QuantConfig(6, 32)).max()) == 0
        assert float(plain.curves[path].of(GRID).min()) > 1e-4
        coarse = QuantConfig(3, 64)
        assert curve.of(coarse) == plain.curves[path].of(coarse)


def test_the_profile_of_other_weights_names_no_grid(make: Maker, tmp_path: Path) -> None:
    save_profile(measurements.get_profile(prepare(str(make(llama(1))))), tmp_path / "p.json")
    assert "grid" not in (tmp_path / "p.json").read_text()


def test_inspect_tells_the_grid(make: Maker, cli: Cli) -> None:
    plain = cli("inspect", str(make(llama(1), "plain")), "--json").json
    assert all("grid" not in layer for layer in plain["layers"].values())
    source = str(put_on_grid(make(llama(1))))
    data = cli("inspect", source, "--json").json
    assert {layer["grid"] for layer in data["layers"].values()} == {CONFIG}
    assert "on a 4-bit grid of 64" in " ".join(cli("inspect", source).out.split())
