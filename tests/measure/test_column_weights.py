"""A column weighs as much as the norm before it multiplies its inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import HIDDEN, TOKENS, Maker, Weights, edit_weights, kl, qwen3_moe

from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.checkpoint import row_reader
from mint_mlx.checkpoint.layers import Inventory
from mint_mlx.checkpoint.source import Source
from mint_mlx.jobs import measurements
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.model import Job, prepare
from mint_mlx.measure import fisher
from mint_mlx.measure.column_weights import column_weights
from mint_mlx.measure.profile_file import load_profile, save_profile
from mint_mlx.measure.row_sampling import measure_sample
from mint_mlx.measure.sample import AUTO

CONFIGS = (QuantConfig(3, 64), QuantConfig(4, 32))
LARGE = 96.0  # times which some columns are larger


def even(weights: Weights) -> Weights:
    """All gains are one."""
    norms = {k: mx.ones_like(v) for k, v in weights.items() if "norm" in k}
    return weights | norms


def compensated(weights: Weights) -> Weights:
    """Some columns of the first block's attention are larger, the gain before them smaller."""
    weights = even(weights)
    few = mx.arange(weights["model.layers.0.input_layernorm.weight"].shape[0]) % 16 == 3
    factor = mx.where(few, LARGE, 1.0)
    norm = "model.layers.0.input_layernorm.weight"
    weights[norm] = (weights[norm] / factor).astype(mx.bfloat16)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"model.layers.0.self_attn.{name}.weight"
        weights[key] = (weights[key] * factor).astype(mx.bfloat16)
    return weights


def test_columns_that_a_gain_makes_small_do_not_hide_the_others(
    make: Maker, tmp_path: Path
) -> None:
    folder = make(qwen3_moe(2))
    edit_weights(folder, compensated)
    profile = measurements.get_profile(prepare(str(folder)))
    config = QuantConfig(4, 64)

    # Nearly all of the sum of squares is in columns that hardly count: the others are lost.
    curve = profile.curves["model.layers.0.self_attn.q_proj"]
    assert curve.of(config).mean() < 0.02
    assert curve.of(config, weighted=True).mean() > 0.3
    other = profile.curves["model.layers.1.self_attn.q_proj"]
    assert other.weighted is None

    # The file holds both; one of an earlier version has one only.
    save_profile(profile, tmp_path / "p.json")
    read = load_profile(tmp_path / "p.json").curves[curve.path]
    assert read.weighted is not None
    np.testing.assert_array_equal(read.weighted, curve.weighted)
    data = json.loads((tmp_path / "p.json").read_text())
    data.pop("checksum")
    for layer in data["layers"]:
        layer.pop("weighted", None)
    (tmp_path / "old.json").write_text(json.dumps(data))
    old = load_profile(tmp_path / "old.json").curves[curve.path]
    np.testing.assert_array_equal(old.of(config, weighted=True), curve.of(config))


def test_rows_of_up_weigh_the_columns_after_it_where_they_differ(make: Maker) -> None:
    folder = make(qwen3_moe(1))
    edit_weights(folder, even)
    job = prepare(str(folder))
    assert not column_weights(job.source, job.inventory)

    def uneven(weights: Weights) -> Weights:
        for key in list(weights):
            if key.endswith("up_proj.weight"):
                rows = mx.arange(weights[key].shape[0])[:, None]
                weights[key] = mx.where(rows % 8 == 1, 32 * weights[key], weights[key])
        return weights

    edit_weights(folder, uneven)
    job = prepare(str(folder))
    ((path, weights),) = column_weights(job.source, job.inventory).items()
    assert path == "model.layers.0.mlp.switch_mlp.down_proj"
    assert (weights[:, 1::8].min(axis=1) > 100 * weights[:, 2::8].max(axis=1)).all()


def test_a_sample_estimates_the_weighted_error() -> None:
    rng = np.random.default_rng(0)
    shape = (2, 1600, 512)
    values = rng.standard_t(6, shape) * np.exp(rng.normal(size=shape[2]))
    weight = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    columns = np.exp(2 * rng.normal(size=(1, shape[2])))
    read = partial(row_reader.select_rows, weight)
    sampled = measure_sample(read, shape, CONFIGS, AUTO, np.random.default_rng(1), columns)
    whole = measure_sample(read, shape, CONFIGS, "1", rng, columns)
    assert sampled.share < 1
    assert whole.weighted is not None
    assert sampled.weighted is not None
    np.testing.assert_allclose(sampled.weighted, whole.weighted, rtol=0.15)

    # By hand, for one configuration.
    packed = mx.quantize(weight, 64, 3)
    restored = mx.dequantize(*packed, group_size=64, bits=3).astype(mx.float32)
    exact = np.array(weight.astype(mx.float32), dtype=np.float64)
    errors = (np.square(np.array(restored) - exact) * columns).sum(axis=(1, 2))
    by_hand = errors / (np.square(exact) * columns).sum(axis=(1, 2))
    assert whole.weighted[0] == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("measuring", [column_weights, fisher.check_chain])
def test_a_full_disk_is_not_a_model_that_cannot_be_run(
    job: Job, monkeypatch: pytest.MonkeyPatch, measuring: Callable[[Source, Inventory], Any]
) -> None:
    """Else a result would depend on it."""

    def full(*_: object) -> None:
        raise RuntimeError("filesystem error: cannot create directories: No space left on device")

    monkeypatch.setattr("mint_mlx.measure.column_weights.trace", full)
    monkeypatch.setattr(fisher, "_load", full)
    with pytest.raises(RuntimeError, match="No space left"):
        measuring(job.source, job.inventory)


def test_a_model_whose_gains_compensate_is_closer_than_uniform_at_its_bytes(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(qwen3_moe(2))

    def uneven(weights: Weights) -> Weights:
        """A tenth of the columns of the first block are larger, the gains before them smaller."""
        factor = mx.where(mx.arange(HIDDEN) % 10 == 3, 16.0, 1.0)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            key = f"model.layers.0.{norm}.weight"
            weights[key] = (weights[key] / factor).astype(mx.bfloat16)
        reads = re.compile(r"model\.layers\.0\..*(q|k|v|gate|up)(_proj)?\.weight")
        for key in filter(reads.fullmatch, list(weights)):
            weights[key] = (weights[key] * factor).astype(mx.bfloat16)
        return weights

    edit_weights(folder, uneven)
    uniform = convert(str(folder), uniform="4bit-g64", out=tmp_path / "uniform", smoke=False)
    budget = f"{uniform.bytes}B"
    fast = convert(str(folder), budget, tmp_path / "fast", smoke=False)
    of_uniform = kl(folder, uniform.path, TOKENS)
    assert kl(folder, fast.path, TOKENS) < 0.6 * of_uniform

    # Without the gains it is hardly better: the profile would not see which columns count.
    monkeypatch.setattr("mint_mlx.measure.profile.column_weights", lambda *_: {})
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "other"))
    blind = convert(str(folder), budget, tmp_path / "blind", smoke=False)
    assert kl(folder, blind.path, TOKENS) > 1.5 * kl(folder, fast.path, TOKENS)
