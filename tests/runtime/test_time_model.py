"""Times of products and of what a model takes beside them."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers import Maker, qwen3_moe
from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from mint_mlx.allocation.uniform import uniform_choice
from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP, MX_MODES, QuantConfig, mx_mode
from mint_mlx.jobs.model import prepare
from mint_mlx.runtime import time_model
from mint_mlx.runtime.clock import start_clock, tick_seconds, timed
from mint_mlx.runtime.device import on_cpu
from mint_mlx.runtime.random_weights import random_codes
from mint_mlx.runtime.speed_table import LayerKind, SpeedTable, Timing, kind_of
from mint_mlx.runtime.time_layers import Bench, Product, time_product, timing

KINDS = (
    LayerKind("linear", (1, 96, 128), 1, "BF16"),
    LayerKind("experts", (8, 64, 128), 2, "BF16"),
    LayerKind("multi-linear", (4, 32, 64), 4, "BF16"),
)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("config", [QuantConfig(3, 32), mx_mode("mxfp8"), KEEP], ids=str)
@pytest.mark.parametrize("batch", [1, 40])
def test_every_kind_of_product_is_timed(kind: LayerKind, config: QuantConfig, batch: int) -> None:
    runs = time_product(Product(kind, config, batch), 0.001, Bench(start_clock(), 1e5, {}, {}))
    if kind.kind == "experts" and config == KEEP and on_cpu():
        assert not runs  # gather_mm takes float32 only
        return
    assert len(runs) >= 1 and timing(runs).seconds > 0 and timing(runs).spread >= 0


def test_work_is_timed_in_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = start_clock()
    assert clock.products >= 1 and not clock.ticks

    # A machine at half its speed: twice the seconds, as many ticks.
    ticks = iter([0.002, 0.002, 0.004, 0.004])
    monkeypatch.setattr("mint_mlx.runtime.clock._tick", lambda _: next(ticks))
    assert timed(clock, lambda: 0.1) == (0.1, 50)
    assert timed(clock, lambda: 0.2) == (0.2, 50)


def test_longer_work_has_more_ticks_beside_it_and_one_stop_does_not_count() -> None:
    clock = start_clock()
    timed(clock, lambda: 1.0)
    assert len(clock.ticks) == 2
    timed(clock, lambda: 1.0, expected=0.1)
    assert len(clock.ticks) > 10
    clock.ticks[:] = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 500.0]
    assert tick_seconds(clock) == 1.75


@pytest.mark.parametrize("mode", ["affine", *MX_MODES])
def test_random_codes_have_the_size_that_is_asked_for(mode: str) -> None:
    config = QuantConfig(5, 64) if mode == "affine" else mx_mode(mode)
    weight = random_codes((32,), 256, config, 0.02, mx.bfloat16)
    values = mx.dequantize(
        weight["weight"],
        weight["scales"],
        weight.get("biases"),
        group_size=config.group_size,
        bits=config.bits,
        mode=config.mode,
    )
    assert values.shape == (32, 256)
    root = mx.sqrt(mx.mean(values.astype(mx.float32) ** 2)).item()
    assert 0.5 < root / 0.02 < 2


@pytest.mark.parametrize("room", [10**9, 1])
def test_the_rest_is_what_generation_takes_beside_products(
    make: Maker, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    job = prepare(str(make(qwen3_moe(3, 4))))
    choice = uniform_choice(job.inventory, QuantConfig(4, 32))
    kinds = {kind_of(layer) for layer in job.inventory.layers} - {None}
    configs = set(choice.values())
    times = {kind: {config: {1: Timing(1e-6)} for config in configs} for kind in kinds}
    table = SpeedTable("here", {}, times, {})  # type: ignore[arg-type]

    # With little room one block stands for all.
    monkeypatch.setattr(time_model, "ROOM", room)
    monkeypatch.setattr(time_model, "BURSTS", (3, 4))
    reference = time_model.Reference(job.source.config, job.inventory, choice)
    rest = time_model.time_rest(reference, table, "a model", (16, 300), 0.01, start_clock())
    assert set(rest.seconds) == {16, 300}
    assert all(0 < ticks < 500 for ticks in rest.seconds.values())


def test_runs_and_sums_of_groups() -> None:
    groups = [time_model.BlockGroup((0, 1, 2, 3), (0, 1)), time_model.BlockGroup((4, 5), (4,))]
    assert time_model._runs(groups) == [(), (0, 1), (4,)]
    # 10 without blocks; two of the first kind add 6, one of the second 5.
    assert time_model._all_blocks(groups, [10.0, 16.0, 15.0]) == 10 + 4 * 3 + 2 * 5


def test_caches_are_lengthened_as_their_kinds_grow() -> None:
    def filled(cache: KVCache | RotatingKVCache | ChunkedKVCache) -> KVCache:
        cache.update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 4)))
        return cache

    plain, window, chunk = (
        filled(KVCache()),
        filled(RotatingKVCache(32)),
        filled(ChunkedKVCache(64)),
    )
    for cache in (CacheList(plain, window), chunk):
        time_model._lengthen(cache, 300)
    assert [c.offset for c in (plain, window, chunk)] == [300] * 3
    assert window.keys.shape == (1, 2, 32, 8) and window.values.shape == (1, 2, 32, 4)
    for cache, length in ((plain, 301), (window, 32), (chunk, 65)):
        keys, _ = cache.update_and_fetch(mx.ones((1, 2, 1, 8)), mx.ones((1, 2, 1, 4)))
        assert keys.shape[2] == length and cache.offset == 301
    with pytest.raises(MintError, match="kind SimpleNamespace"):
        time_model._lengthen(SimpleNamespace(), 300)
