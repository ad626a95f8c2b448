"""Latent codes take Adam's steps, alike on a CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mint_mlx.converters.quantizers import latents

BITS, RATE = 3, 0.05
SHAPES = [(64, 96), (3, 32, 64)]
Stepped = tuple[mx.array, tuple[mx.array, mx.array], tuple[mx.array, mx.array]]


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[mx.array, mx.array, mx.array]:
    """Latent codes of all sizes, scales and biases, in groups of 32."""
    rng = np.random.default_rng(seed)
    groups = *shape[:-1], shape[-1] // 32
    sizes = (shape, 2.0), (groups, 0.1), (groups, 0.1)
    arrays = (rng.normal(3, width, size).astype(np.float32) for size, width in sizes)
    latent, scales, biases = map(mx.array, arrays)
    return latent, scales, biases


def stepped(shape: tuple[int, ...], steps: int) -> Stepped:
    """What some steps make of them."""
    latent, scales, _ = drawn(shape)
    moments = mx.zeros_like(latent), mx.zeros_like(latent)
    sums = scales, scales
    for step in range(steps):
        slope = drawn(shape, step + 1)[0]
        latent, moments, sums = latents.take_step(
            latent, moments, slope, scales, BITS, RATE / (step + 1), step + 1
        )
    return latent, moments, sums


def expected(shape: tuple[int, ...], steps: int) -> Stepped:
    """The same by MLX's Adam and plain operations."""
    latent, scales, _ = drawn(shape)
    optimizer = optim.Adam(lambda step: RATE / (step + 1), bias_correction=True)
    sums = scales, scales
    for step in range(steps):
        slope = drawn(shape, step + 1)[0].reshape(*scales.shape, -1)
        codes = mx.clip(mx.round(latent), 0, 2**BITS - 1).reshape(slope.shape)
        sums = mx.sum(slope * codes, axis=-1), mx.sum(slope, axis=-1)
        gradient = (slope * scales[..., None]).reshape(shape)
        latent = optimizer.apply_gradients({"latent": gradient}, {"latent": latent})["latent"]
        latent = mx.clip(latent, -0.5, 2**BITS - 0.5)
    state: Any = optimizer.state["latent"]
    return latent, (state["m"], state["v"]), sums


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, on this device; not compiled, which takes a CPU seconds."""
    monkeypatch.setattr(latents, "on_cpu", lambda: request.param == "cpu")
    monkeypatch.setattr(latents, "_compiled_step", latents._step_of_arrays)
    monkeypatch.setattr(latents, "_compiled_dense", latents._dense_of_arrays)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("device")
def test_a_step_is_adams(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_mlx.runtime.fast_math.CHUNK", 1000)  # several chunks
    near = {"rtol": 1e-4, "atol": 1e-4}
    new, moments, sums = stepped(shape, 3)
    true_new, true_moments, true_sums = expected(shape, 3)
    np.testing.assert_allclose(np.array(new), np.array(true_new), **near)
    for ours, true in zip((*moments, *sums), (*true_moments, *true_sums), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(true), **near)


@pytest.mark.usefixtures("device")
def test_a_weight_is_its_codes_on_its_grid() -> None:
    latent, scales, biases = drawn((64, 96))
    codes = np.clip(np.rint(np.array(latent)), 0, 7).reshape(64, 3, 32)
    by_group = (np.array(array)[..., None] for array in (scales, biases))
    scale, bias = by_group
    out = latents.dense(latent, scales, biases, BITS, mx.float32)
    np.testing.assert_allclose(np.array(out), (codes * scale + bias).reshape(64, 96), rtol=1e-6)


def test_a_gpu_compiles_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number of a step, nor its rate, nor the bits of a layer is compiled in."""
    traced = []

    def counted(*arrays: mx.array) -> tuple[mx.array, ...]:
        traced.append(arrays[0].shape)
        return latents._step_of_arrays(*arrays)

    monkeypatch.setattr(latents, "on_cpu", lambda: False)
    monkeypatch.setattr(latents, "_compiled_step", mx.compile(counted))
    for bits in (2, 3):
        monkeypatch.setitem(globals(), "BITS", bits)
        for shape in SHAPES:
            stepped(shape, 4)
    assert traced == SHAPES
