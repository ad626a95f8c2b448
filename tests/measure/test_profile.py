"""The profile measures the error of MLX's own quantizer, per expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import MX_MODES, QuantConfig, affine, mx_mode
from mint_mlx.checkpoint.layers import Layer
from mint_mlx.jobs import measurements, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.measure import cache, distortion
from mint_mlx.measure import profile as profiles
from mint_mlx.measure.distortion import measure
from mint_mlx.measure.profile_file import load_profile, save_profile


def direct(weight: mx.array, config: QuantConfig) -> float:
    """The definition, in float64 numpy."""
    packed = mx.quantize(weight, config.group_size, config.bits, mode=config.mode)
    restored = mx.dequantize(
        *packed, group_size=config.group_size, bits=config.bits, mode=config.mode
    )
    w, q = (np.asarray(a.astype(mx.float32), dtype=np.float64) for a in (weight, restored))
    return float(((w - q) ** 2).sum() / (w**2).sum())


@pytest.mark.parametrize("config", [*affine(), *(mx_mode(m) for m in MX_MODES)], ids=str)
def test_nmse_is_that_of_the_round_trip_for_each_expert(config: QuantConfig) -> None:
    weight = (
        mx.random.normal((3, 24, 256), key=mx.random.key(0)) * mx.array([[[1.0]], [[3.0]], [[0.1]]])
    ).astype(mx.bfloat16)
    found, _ = measure(weight, [config])
    assert found.shape == (1, 3)
    np.testing.assert_allclose(found[0], [direct(weight[e], config) for e in range(3)], rtol=1e-4)


def test_chunks_do_not_change_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = mx.random.normal((2, 40, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    whole, energy = measure(weight, affine())
    monkeypatch.setattr(distortion, "CHUNK", 1000)
    np.testing.assert_allclose(measure(weight, affine())[0], whole, rtol=1e-5)
    np.testing.assert_allclose(
        energy, (np.array(weight.astype(mx.float32)) ** 2).sum((-2, -1)), rtol=1e-4
    )


def test_an_expert_of_zeros_has_no_error() -> None:
    weight = mx.concatenate([mx.zeros((1, 8, 64)), mx.ones((1, 8, 64))]).astype(mx.bfloat16)
    assert measure(weight, [QuantConfig(2, 64)])[0][0, 0] == 0


def test_a_profile_survives_its_file(make: Maker, tmp_path: Path) -> None:
    made = measurements.get_profile(prepare(str(make(qwen3_moe(2)))))
    save_profile(made, tmp_path / "p.json")
    read = load_profile(tmp_path / "p.json")
    assert read.inventory == made.inventory and read.origin.fingerprint == made.origin.fingerprint
    for path, curve in made.curves.items():
        assert read.curves[path].configs == curve.configs
        assert np.array_equal(read.curves[path].nmse, curve.nmse)


def test_a_layer_is_measured_where_its_group_divides(make: Maker) -> None:
    made = measurements.get_profile(prepare(str(make(qwen3_moe(1)))))
    assert {
        c.group_size for c in made.curves["model.layers.0.mlp.switch_mlp.down_proj"].configs
    } == {32, 64}
    assert {c.group_size for c in made.curves["model.layers.0.mlp.switch_mlp.up_proj"].configs} == {
        32,
        64,
        128,
    }


def test_a_profile_is_cached_until_the_source_changes(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    measurements.get_profile(prepare(str(folder)))
    calls = []
    monkeypatch.setattr(measurements, "profile", lambda *a: calls.append(a) or profiles.profile(*a))
    measurements.get_profile(prepare(str(folder)))
    assert not calls
    make(llama(1), seed=5)
    measurements.get_profile(prepare(str(folder)))
    assert len(calls) == 1


def test_an_interrupted_profile_goes_on_after_the_last_layer(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, measure_layer, measured = str(make(qwen3_moe(2))), profiles._measure, []

    def interrupted(layer: Layer, *more: Any) -> Any:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(layer.path)
        return measure_layer(layer, *more)

    monkeypatch.setattr(profiles, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.write_profile(folder, tmp_path / "p.json")
    (left,) = (cache.cache_dir() / "profiles").glob("*.begun-*")
    left.write_text(left.read_text() + '{"model.norm": {"cut sh')  # killed while it wrote
    first, measured[:] = set(measured), []
    monkeypatch.setattr(
        profiles,
        "_measure",
        lambda layer, *more: measured.append(layer.path) or measure_layer(layer, *more),
    )
    _, made = steps.write_profile(folder, tmp_path / "p.json")
    assert (
        len(first) == 5
        and not first & set(measured)
        and first | set(measured) == made.curves.keys()
    )
    assert not list((cache.cache_dir() / "profiles").glob("*.begun-*"))
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "other"))
    steps.write_profile(folder, tmp_path / "fresh.json")
    assert (tmp_path / "fresh.json").read_bytes() == (tmp_path / "p.json").read_bytes()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"mint_mlx_profile": 1}', '{"mint_mlx_profile": 99}', "[" * 50_000]
)
def test_files_that_are_no_profile_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(MintError):
        load_profile(tmp_path / "p.json")


def test_a_damaged_profile_is_made_anew_and_nothing_else_is_replaced(
    make: Maker, tmp_path: Path
) -> None:
    folder, file = str(make(llama(1))), tmp_path / "p.json"
    steps.write_profile(folder, file)
    whole = file.read_text()
    file.write_text(whole[:500])
    steps.write_profile(folder, file)
    assert file.read_text() == whole
    (tmp_path / "notes.json").write_text("{}")
    for wrong in (tmp_path / "notes.json", tmp_path, tmp_path / "no" / "p.json"):
        with pytest.raises(MintError):
            steps.write_profile(folder, wrong)
    for wrong in (file, tmp_path / "notes.json"):
        with pytest.raises(MintError, match="something else"):
            steps.plan_profile(file, "5bpw", wrong)
    plan = tmp_path / "plan.yaml"
    steps.plan_profile(file, "5bpw", plan)
    with pytest.raises(MintError, match="--force"):
        steps.plan_profile(file, "6bpw", plan)
    steps.plan_profile(file, "6bpw", plan, force=True)


def test_a_profile_carries_its_recipe(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nabout: stricter\nsqnr_floor: 30\n")
    path, made = steps.write_profile(
        str(make(llama(1))), tmp_path / "p.json", str(tmp_path / "mine.yaml")
    )
    plan, _ = steps.plan_profile(path, "smallest")
    assert made.recipe.sqnr_floor == 30 and plan.recipe == "mine"
    assert min(c.bits for c in plan.choice.values()) >= 5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"order": ["model.embed_tokens"', '"order": ["model.surprise"'),
        ('"dtype": "BF16"', '"dtype": "Q9"'),
        ('"shape": [96, 128]', '"shape": "x"'),
        ('"4bit-g64"', '"4bit-g63"'),
        ('"recipe": {', '"recipe": 3, "x": {'),
    ],
)
def test_a_profile_that_was_tampered_with_is_refused(
    make: Maker, tmp_path: Path, old: str, new: str
) -> None:
    path, _ = steps.write_profile(str(make(llama(1))), tmp_path / "p.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(MintError, match="damaged"):
        load_profile(path)


def test_the_file_is_plain_json(make: Maker, tmp_path: Path) -> None:
    save_profile(measurements.get_profile(prepare(str(make(llama(1))))), tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["layers"][0]["nmse"]["4bit-g64"][0] == pytest.approx(0.008, rel=0.5)
