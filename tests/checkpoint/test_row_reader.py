"""Rows that are read alone are those of the layer."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, qwen3_moe
from released import FAMILIES, known, released

from mint_mlx.checkpoint import row_reader
from mint_mlx.checkpoint.layer_stream import stream
from mint_mlx.jobs import measurements
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.sample import EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_read_from_the_disk_are_those_of_the_layer(family: str, tmp_path: Path) -> None:
    if not known(family):
        pytest.skip("mlx-lm is older than this family")
    job = prepare(str(released(family, tmp_path / family)))
    layers = {layer.path: layer for layer in job.inventory.layers}
    straight = row_reader.straight_layers(job.source, job.inventory.layers)

    # Experts in tensors of their own map straight through.
    if family in ("qwen3_moe", "mixtral", "olmoe", "qwen3_5_moe"):
        unquantized = [layer for layer in layers.values() if layer.stored is None]
        experts = [layer.path for layer in unquantized if layer.kind == "experts"]
        assert experts
        assert all(path in straight for path in experts)

    # Three rows of each of half of the experts are those of the whole layer.
    rng = np.random.default_rng(0)
    paths = [path for path in job.inventory.order if path in straight]
    for path, tensors in stream(job.source, job.inventory, paths):
        layer = layers[path]
        count, height, _ = layer.as_experts
        experts = np.sort(rng.permutation(count)[: max(1, count // 2)])
        rows = np.sort(rng.integers(0, height, (len(experts), 3)), axis=1)
        whole = tensors["weight"].reshape(layer.as_experts)
        read = straight[path].read(job.source, layer, experts, rows)
        assert read.dtype == whole.dtype, path
        assert mx.array_equal(read, row_reader.select_rows(whole, experts, rows)).item(), path


def test_of_a_layer_that_maps_straight_through_only_the_drawn_rows_are_read(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(make(qwen3_moe(1))))
    touched: list[str] = []

    def watched(source: object, inventory: object, paths: list[str], *more: object) -> object:
        touched.extend(paths)
        return stream(source, inventory, paths, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("mint_mlx.measure.profile.stream", watched)
    profile = measurements.get_profile(job, sample="0.1")
    assert not touched
    assert profile.sample == "0.1"
    assert all(curve.share < 0.6 for curve in profile.curves.values() if len(curve.configs))
    measurements.get_profile(job, sample=EXACT)
    assert touched
