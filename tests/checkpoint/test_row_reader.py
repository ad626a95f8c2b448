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


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_read_from_the_disk_are_those_of_the_layer(family: str, tmp_path: Path) -> None:
    if not known(family):
        pytest.skip("mlx-lm is older than this family")
    job = prepare(str(released(family, tmp_path / family)))
    layers = {layer.path: layer for layer in job.inventory.layers}
    straight = row_reader.straight_layers(job.source, job.inventory.layers)
    experts = [
        layer for layer in layers.values() if layer.kind == "experts" and layer.stored is None
    ]
    if family in ("qwen3_moe", "mixtral", "olmoe"):
        assert experts
        assert all(layer.path in straight for layer in experts)
    rng = np.random.default_rng(0)
    for path, tensors in stream(
        job.source, job.inventory, [p for p in job.inventory.order if p in straight]
    ):
        layer = layers[path]
        count, height, _ = layer.as_experts
        chosen = np.sort(rng.permutation(count)[: max(1, count // 2)])
        which = np.sort(rng.integers(0, height, (len(chosen), 3)), axis=1)
        whole = tensors["weight"].reshape(layer.as_experts)
        read = straight[path].read(job.source, layer, chosen, which)
        assert read.dtype == whole.dtype, path
        assert mx.array_equal(read, row_reader.picked(whole, chosen, which)).item(), path


def test_of_a_layer_that_maps_straight_through_only_the_drawn_rows_are_read(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(make(qwen3_moe(1))))
    touched: list[str] = []

    def watched(source: object, inventory: object, paths: list[str], *more: object) -> object:
        touched.extend(paths)
        return stream(source, inventory, paths, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("mint_mlx.checkpoint.layer_stream.stream", watched)
    made = measurements.get_profile(job, sample="0.1")
    assert not touched
    assert made.sample == "0.1"
    assert all(curve.share < 0.6 for curve in made.curves.values() if len(curve.configs))
    measurements.get_profile(job, sample="1.0")
    assert touched
