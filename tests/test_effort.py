"""What looks at the model's own text: tokens, Fisher information, error feedback, and the levels of effort."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import Maker, Notes, llama, qwen3_moe
from families import write_family
from hypothesis import given, settings
from hypothesis import strategies as st
from released import known, released

from mint_mlx import begun, blocks, efforts, pipeline, refine, runner
from mint_mlx import tokens as tokens_module
from mint_mlx.allocate import allocate
from mint_mlx.blocks import NoChain
from mint_mlx.converters import gptq, rtn
from mint_mlx.converters.pack import pack
from mint_mlx.errors import MintError
from mint_mlx.inputs import Moments, block_inputs
from mint_mlx.load import load_source
from mint_mlx.order import prepare
from mint_mlx.quant import QuantConfig, affine
from mint_mlx.sensitivity import load_sensitivity, measure, save_sensitivity
from mint_mlx.tokens import resample, write_tokens
from mint_mlx.units import parse_budget

TOKENS = np.random.default_rng(0).integers(0, 96, (4, 24)).astype(np.int32)


def restore(packed: dict[str, mx.array], config: QuantConfig) -> np.ndarray:
    size = {"group_size": config.group_size, "bits": config.bits, "mode": config.mode}
    weight = mx.dequantize(packed["weight"], packed["scales"], packed.get("biases"), **size)
    return np.array(weight.astype(mx.float32))


# Tokens


def test_tokens_are_the_models_own_and_the_same_each_time(demo_model: Path) -> None:
    source = prepare(str(demo_model)).source
    one, how = write_tokens(source, 2048, 1024, start=7, length=64)
    two, _ = write_tokens(source, 2048, 1024, start=7, length=64)
    assert one.shape == (16, 64) and (one[:, 0] == 7).all() and "sampled" in how
    np.testing.assert_array_equal(one, two)
    other, _ = write_tokens(source, 2048, 1024, start=7, length=64, seed=1)
    assert (one != other).mean() > 0.5
    loaded = runner.load_runner(demo_model)

    def loss(tokens: np.ndarray) -> float:
        logits = loaded.model(mx.array(tokens[:, :-1]))
        return float(mx.mean(nn.losses.cross_entropy(logits, mx.array(tokens[:, 1:]))).item())

    noise = np.random.default_rng(0).integers(0, 2048, one.shape).astype(np.int32)
    assert loss(one) < 0.6 * loss(noise)


def test_text_that_was_interrupted_goes_on_after_its_last_pass(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place, done = prepare(str(demo_model)).source, tmp_path / "kept" / "s.npz", []
    whole, how = write_tokens(source, 2048, 256, length=64, streamed=True)

    def interrupted(*args: Any) -> np.ndarray:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(None)
        return resample(*args)

    monkeypatch.setattr(tokens_module, "resample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(source, 2048, 256, length=64, streamed=True, place=place)
    monkeypatch.setattr(tokens_module, "resample", lambda *args: done.append(None) or resample(*args))
    again, also = write_tokens(source, 2048, 256, length=64, streamed=True, place=place)
    np.testing.assert_array_equal(whole, again)
    assert also == how and len(done) == tokens_module.PASSES
    assert begun.text(place) is not None
    begun.clear(place)
    assert not list(place.parent.iterdir())
    place.with_name(f"{place.name}.begun-text").write_bytes(b"cut short")
    assert begun.text(place) is None


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("calls", [1, 3, 4, 5])
def test_a_walk_that_was_interrupted_goes_on_to_the_same_numbers(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, streamed: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    job = prepare(str(make(qwen3_moe(3))))

    def walk(stop: int | None = None) -> tuple[Path, list[str]]:
        seen: list[str] = []

        def progress(what: str, *_: int) -> None:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(what)

        made = measure(job.source, job.inventory, TOKENS, "r", progress=progress, streamed=streamed, key="k")
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        save_sensitivity(TOKENS, made, path)
        return path, seen

    whole, _ = walk()
    assert not list((tmp_path / "work").iterdir())
    with pytest.raises(KeyboardInterrupt):
        walk(calls)
    (left,) = (tmp_path / "work").iterdir()
    assert (left.stat().st_mode & 0o77) == 0
    run_again = []
    run = blocks.run
    monkeypatch.setattr(blocks, "run", lambda step, *more: run_again.append(step.index) or run(step, *more))
    again, _ = walk()
    assert whole.read_bytes() == again.read_bytes()
    assert run_again == list(range(calls, 3))
    assert not list((tmp_path / "work").iterdir())


def test_resampled_tokens_are_the_same_streamed_or_not(demo_model: Path) -> None:
    source = prepare(str(demo_model)).source
    tokens = np.random.default_rng(0).integers(0, 2048, (4, 64)).astype(np.int32)
    whole, streamed = (resample(runner.load_runner(source.path, s), tokens, mx.random.key(3)) for s in (False, True))
    np.testing.assert_array_equal(whole, streamed)
    assert (whole[:, 0] == tokens[:, 0]).all() and (whole[:, 1:] != tokens[:, 1:]).mean() > 0.5


# Fisher information


def whole_model_trace(folder: Path, tokens: np.ndarray, path: str) -> float:
    """|g|^2 |x|^2 of one linear layer by differentiating the whole model at once."""
    loaded = runner.load_runner(folder)
    layer = dict(loaded.model.named_modules())[path]
    seen: list[mx.array] = []

    def loss(tap: mx.array) -> mx.array:
        class Tapped(nn.Module):
            def __call__(self, x: mx.array) -> mx.array:
                seen.append(mx.stop_gradient(x))
                return layer(x) + tap

        loaded.model.update_modules(_nested(path, Tapped()))
        logits = loaded.model(mx.array(tokens)).astype(mx.float32)
        labels = mx.array(LABELS)
        return mx.sum(nn.losses.cross_entropy(logits, labels))

    shape = (*tokens.shape, layer.weight.shape[0])
    grad = mx.grad(loss)(mx.zeros(shape))
    return float(mx.sum(mx.sum(mx.square(grad), -1) * mx.sum(mx.square(seen[0]), -1)).item())


def _nested(path: str, value: Any) -> Any:
    from mlx.utils import tree_unflatten

    return tree_unflatten([(path, value)])


LABELS = np.random.default_rng(1).integers(0, 96, TOKENS.shape)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_walk_gives_the_whole_models_gradient(make: Maker, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    folder = make(llama(3))
    job = prepare(str(folder))
    monkeypatch.setattr("mint_mlx.blocks.LOGITS", 1)  # one position at a time, so that labels can be handed out
    calls: list[int] = []

    def fixed(logits: mx.array, key: mx.array) -> mx.array:
        calls.append(0)  # each position is run twice: for the shapes, then for the gradient
        position = (len(calls) - 1) // 2
        return mx.array(LABELS[:, position : position + 1])

    monkeypatch.setattr(mx.random, "categorical", fixed)
    made = measure(job.source, job.inventory, TOKENS, "random", batch=len(TOKENS), streamed=streamed)
    for path in (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.up_proj",
        "lm_head",
    ):
        expected = whole_model_trace(folder, TOKENS, path)
        assert made.trace[path].sum() == pytest.approx(expected, rel=1e-3), path


def test_experts_are_told_apart_and_streaming_changes_nothing(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2, experts=8))))
    whole, streamed = (measure(job.source, job.inventory, TOKENS, "r", batch=2, streamed=s) for s in (False, True))
    down = "model.layers.1.mlp.switch_mlp.down_proj"
    assert whole.trace[down].shape == (8,) and len(set(whole.trace[down])) == 8
    assert whole.weights[down].weight.shape == (TOKENS.size, 2) and whole.weights[down].part is not None
    for path in whole.trace:
        np.testing.assert_allclose(whole.trace[path], streamed.trace[path], rtol=1e-4)
        assert whole.trace[path].sum() > 0


def test_the_prediction_is_near_the_divergence(demo_model: Path, tmp_path: Path) -> None:
    """At 5 bits per weight the predicted KL is within a factor of two of the measured one."""
    job = prepare(str(demo_model))
    tokens, how = write_tokens(job.source, 2048, 2048, length=64)
    curves, made = pipeline.get_profile(job), measure(job.source, job.inventory, tokens, how)
    plan = allocate(curves, parse_budget("5bpw"), job.recipe, "fisher", sensitivity=made)
    pipeline.convert(str(demo_model), plan=plan, out=tmp_path / "out", smoke=False)
    fresh, _ = write_tokens(job.source, 2048, 2048, seed=9, length=64)
    logp = []
    for folder in (demo_model, tmp_path / "out"):
        logits = runner.load_runner(folder).model(mx.array(fresh))
        logp.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    divergence = float(mx.mean(mx.sum(mx.exp(logp[0]) * (logp[0] - logp[1]), axis=-1)).item())
    assert plan.loss is not None and plan.loss / 2 < divergence < plan.loss * 2


@pytest.mark.parametrize("family", ["gemma4_text", "hunyuan"])
def test_a_model_that_is_no_chain_falls_back_to_its_weights(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / family, family)
    job = prepare(str(folder))
    with pytest.raises(NoChain):
        measure(job.source, job.inventory, TOKENS, "random")
    notes = Notes()
    result = pipeline.convert(str(folder), "6bpw", tmp_path / "out", effort="balanced", smoke=False, report=notes)
    assert result.plan.objective == "prior" and result.plan.quantizer == "rtn"
    assert any("cannot be walked through" in note for note in notes.said)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next", "llama4", "gemma3_text", "kimi_k2"])
def test_released_families_are_balanced(tmp_path: Path, family: str) -> None:
    """Sliding windows, latents, linear attention, chunks, tied heads and quantized sources: the whole level runs."""
    if not known(family):
        pytest.skip("this mlx-lm has no such family")
    folder = released(family, tmp_path / family)
    result = pipeline.convert(str(folder), "5bpw", tmp_path / "out", effort="balanced", smoke=False)
    assert (
        result.plan.objective == "fisher-gptq" and result.plan.quantizer == "gptq" and result.plan.effort == "balanced"
    )
    own = pipeline.get_sensitivity(prepare(str(folder)))
    assert own is not None
    moments = Moments(load_source(str(folder)), result.inventory, *own)
    followed = [layer.path for layer in result.inventory.layers if layer.kind in ("linear", "experts")]
    assert [path for path in followed if moments.of(path) is None] == []


def test_a_sensitivity_survives_its_file(make: Maker, tmp_path: Path) -> None:
    job = prepare(str(make(qwen3_moe(1))))
    made = measure(job.source, job.inventory, TOKENS, "random")
    assert made.metric.keys() == {0} and made.metric[0].shape == (128, 128) and made.embedding is not None
    save_sensitivity(TOKENS, made, tmp_path / "s.npz")
    tokens, read = load_sensitivity(tmp_path / "s.npz")
    np.testing.assert_array_equal(tokens, TOKENS)
    assert (read.source, read.how, read.tokens) == (made.source, made.how, made.tokens)
    for path, trace in made.trace.items():
        np.testing.assert_array_equal(read.trace[path], trace)
    for path, weights in made.weights.items():
        np.testing.assert_array_equal(read.weights[path].weight, weights.weight)
        assert (read.weights[path].part is None) == (weights.part is None)
        if weights.part is not None:
            np.testing.assert_array_equal(read.weights[path].part, weights.part)
    np.testing.assert_array_equal(read.metric[0], made.metric[0])
    np.testing.assert_array_equal(read.embedding, made.embedding)
    whole = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(whole[:500])
    with pytest.raises(MintError, match="is not a sensitivity"):
        load_sensitivity(tmp_path / "s.npz")
    for place in np.random.default_rng(0).integers(0, len(whole), 60):  # a damaged one is refused, never a traceback
        (tmp_path / "s.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with contextlib.suppress(MintError):
            load_sensitivity(tmp_path / "s.npz")


def test_a_sensitivity_of_another_model_is_refused(make: Maker) -> None:
    one, two = (prepare(str(make(llama(1), f"m{seed}", seed=seed))) for seed in (0, 1))
    made = measure(one.source, one.inventory, TOKENS, "random")
    with pytest.raises(MintError, match="another model"):
        allocate(pipeline.get_profile(two), parse_budget("5bpw"), two.recipe, "fisher", sensitivity=made)


# Error feedback


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_packed_codes_are_what_mlx_reads(bits: int, rows: int, groups: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * groups)).astype(np.uint8)
    ones, zeros = mx.ones((rows, groups)), mx.zeros((rows, groups))
    read = mx.dequantize(mx.array(pack(codes, bits)), ones, zeros, 32, bits)
    np.testing.assert_array_equal(np.array(read), codes)


@pytest.mark.parametrize("config", affine(groups=(32, 64)), ids=str)
def test_feedback_lowers_the_error_at_the_output(config: QuantConfig) -> None:
    rng = np.random.default_rng(0)
    weight = mx.array(rng.normal(size=(48, 128)).astype(np.float32) * 0.05).astype(mx.bfloat16)
    mix = rng.normal(size=(128, 128)) * np.geomspace(1, 0.05, 128)
    x = (rng.normal(size=(2000, 128)) @ mix).astype(np.float32)  # correlated inputs, as activations are
    moment = x.T @ x / len(x)
    exact = np.array(weight.astype(mx.float32))

    def cost(packed: dict[str, mx.array]) -> float:
        error = restore(packed, config) - exact
        return float(np.einsum("ij,jk,ik->", error, moment, error))

    plain, fed = rtn.quantize(weight, config), gptq.quantize(weight, config, moment[None])
    assert {k: (a.shape, a.dtype) for k, a in plain.items()} == {k: (a.shape, a.dtype) for k, a in fed.items()}
    assert cost(fed) < 0.7 * cost(plain)


def test_without_correlation_feedback_is_rounding_to_nearest() -> None:
    config = QuantConfig(4, 32)
    weight = mx.array(np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32))
    fed = gptq.quantize(weight, config, np.eye(64, dtype=np.float32)[None])
    np.testing.assert_allclose(restore(fed, config), restore(rtn.quantize(weight, config), config), atol=1e-6)


def test_what_has_no_inputs_or_no_grid_is_rounded_to_nearest() -> None:
    weight = mx.random.normal((8, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    moments = np.eye(64, dtype=np.float32)[None]
    for config, given_moments in ((QuantConfig(4, 32), None), (QuantConfig(4, 32, "mxfp4"), moments)):
        fed, plain = gptq.quantize(weight, config, given_moments), rtn.quantize(weight, config)
        assert all(mx.array_equal(fed[name], plain[name]) for name in plain)


def test_moments_are_those_of_the_layers_inputs(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2, experts=8))))
    made = measure(job.source, job.inventory, TOKENS, "random", batch=2)
    blocks = dict(block_inputs(job.source, job.inventory, TOKENS, made, batch=4))
    assert list(blocks) == [0, 1, None] and list(blocks[None]) == ["lm_head"]
    found = blocks[1]["model.layers.1.mlp.switch_mlp.up_proj"]
    assert sum(len(batch.weight) for batch in found.batches) == TOKENS.size * 2 and found.parts == 8
    down = blocks[0]["model.layers.0.mlp.switch_mlp.down_proj"]
    trace = sum(
        np.bincount(batch.part, batch.weight * (np.array(batch.x) ** 2).sum(1), minlength=8) for batch in down.batches
    )
    np.testing.assert_allclose(trace, made.trace["model.layers.0.mlp.switch_mlp.down_proj"], rtol=1e-3)
    moments = Moments(job.source, job.inventory, TOKENS, made)
    of_rows = moments.of("model.embed_tokens")
    assert of_rows is not None and of_rows.shape == (1, 128, 128)
    assert np.trace(of_rows[0]) == pytest.approx(made.trace["model.embed_tokens"].sum(), rel=2e-3)
    q = moments.of("model.layers.1.self_attn.q_proj")
    assert q is not None and q[:].shape == (1, 128, 128)
    assert np.trace(q[:][0]) == pytest.approx(made.trace["model.layers.1.self_attn.q_proj"].sum(), rel=1e-3)
    np.testing.assert_array_equal(np.concatenate([found[:3], found[3:]]), found[:])
    rows = np.concatenate([np.array(batch.x)[batch.part == 5] for batch in found.batches])
    weight = np.concatenate([batch.weight[batch.part == 5] for batch in found.batches])
    every = np.concatenate([np.array(batch.x) * np.sqrt(batch.weight)[:, None] for batch in found.batches])
    pooled = every.T @ every * (128 / len(every))  # a row a column: few rows, so all of them are looked at
    np.testing.assert_allclose(found[5:6][0], (rows * weight[:, None]).T @ rows + pooled, rtol=1e-3, atol=1e-6)


# Levels


def test_balanced_beats_fast_on_a_trained_model(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 4096)
    text = np.asarray(write_tokens(prepare(str(demo_model)).source, 2048, 2048, seed=5, length=64)[0])
    source = runner.load_runner(demo_model).model(mx.array(text))
    source = source - mx.logsumexp(source, axis=-1, keepdims=True)
    divergence = {}
    for effort in ("fast", "balanced"):
        pipeline.convert(str(demo_model), "4bpw", tmp_path / effort, effort=effort, smoke=False)
        logits = runner.load_runner(tmp_path / effort).model(mx.array(text))
        logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        divergence[effort] = float(mx.mean(mx.sum(mx.exp(source) * (source - logp), axis=-1)).item())
    assert divergence["balanced"] < 0.75 * divergence["fast"]


def test_a_sensitivity_is_measured_once(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(make(qwen3_moe(1)))
    first = pipeline.convert(folder, "5bpw", tmp_path / "a", effort="balanced", smoke=False)
    monkeypatch.setattr("mint_mlx.sensitivity.measure", None)
    again = pipeline.convert(folder, "5bpw", tmp_path / "b", effort="balanced", smoke=False)
    assert first.plan.choice == again.plan.choice
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_the_steps_do_what_the_whole_job_does(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    whole = pipeline.convert(folder, "5bpw", tmp_path / "whole", effort="balanced", smoke=False)
    profile, _ = pipeline.write_profile(folder, tmp_path / "p.json")
    sensitivity, _ = pipeline.write_sensitivity(folder, tmp_path / "s.npz")
    plan, _ = pipeline.plan_profile(profile, "5bpw", sensitivity=sensitivity)
    assert plan.objective == "fisher-gptq" and plan.choice == whole.plan.choice
    assert (plan.effort, plan.quantizer) == ("balanced", "gptq")
    again = pipeline.convert(folder, plan=plan, out=tmp_path / "again", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert again.bytes == whole.bytes and files[0] == files[1]


def test_fewer_tokens_are_what_is_looked_at(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    made = pipeline.convert(folder, "5bpw", tmp_path / "out", effort="balanced", tokens=1024, smoke=False)
    tokens, sensitivity = load_sensitivity(made.path / "mint-sensitivity.npz")
    assert tokens.size == sensitivity.tokens == 1024
    alone, _ = pipeline.write_sensitivity(folder, tmp_path / "s.npz", tokens=1024)
    np.testing.assert_array_equal(load_sensitivity(alone)[0], tokens)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": "5bpw", "effort": "fast", "tokens": 2048}, "--tokens is of no use"),
        (
            {"budget": "5bpw", "effort": "balanced", "tokens": 2048, "sensitivity": "s.npz"},
            "either --sensitivity or --tokens",
        ),
        ({"budget": "5bpw", "effort": "heroic"}, "--effort heroic is unknown"),
        ({"budget": "5bpw", "quantizer": "awq"}, "no quantizer is called 'awq'"),
    ],
)
def test_levels_that_cannot_be(make: Maker, more: dict[str, Any], message: str) -> None:
    with pytest.raises(MintError, match=message):
        pipeline.convert(str(make(llama(1))), **more)


# in the second block, and where the head alone is left
@pytest.mark.parametrize(("effort", "units"), [("balanced", 14), ("best", 14), ("best", 99)])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, units: int
) -> None:
    from mint_mlx.converters.writer import Writer

    folder = str(make(qwen3_moe(2)))
    pipeline.convert(folder, "5bpw", tmp_path / "whole", effort=effort, smoke=False)
    put, left = Writer.put, [units]
    if units == 99:
        left = [len(prepare(folder).inventory.order) - 1]

    def stop(self: Writer, unit: str, tensors: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        put(self, unit, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.convert(folder, "5bpw", tmp_path / "out", effort=effort, smoke=False)
    assert (tmp_path / "out.partial").is_dir()
    pipeline.convert(folder, "5bpw", tmp_path / "out", effort=effort, smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert not list((tmp_path / "out").glob("scratch-*"))


@pytest.mark.parametrize("when", ["refining", "rewriting", "verifying"])
def test_an_interruption_at_the_end_of_best_loses_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder, whole = str(make(qwen3_moe(2))), refine.refine

    def gained(*args: Any, **more: Any) -> refine.Refined:
        found = whole(*args, **more)
        return refine.Refined({name: a * 1.0625 for name, a in found.tensors.items()}, 1.0, 0.5)

    monkeypatch.setattr("mint_mlx.refine.refine", gained)
    pipeline.convert(folder, "5bpw", tmp_path / "whole", effort="best", smoke=False)

    def stop(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    places = {"refining": "mint_mlx.refine.predict", "rewriting": "mint_mlx.refine.put_refined"}
    with monkeypatch.context() as patch:
        if when == "verifying":
            put = refine.put_refined
            patch.setattr("mint_mlx.refine.put_refined", lambda *args: (put(*args), stop()))
        else:
            patch.setattr(places[when], stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.convert(folder, "5bpw", tmp_path / "out", effort="best", smoke=False)
    monkeypatch.setattr("mint_mlx.converters.learner.learn", stop)  # nothing is learned again
    pipeline.convert(folder, "5bpw", tmp_path / "out", effort="best", smoke=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


def test_layers_that_no_block_follows_don_t_end_the_walk(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2))))
    made = measure(job.source, job.inventory, TOKENS, "random", batch=2)
    moments = Moments(job.source, job.inventory, TOKENS, made)
    assert moments.of("model.embed_tokens") is not None
    assert moments.of("model.layers.0.mlp.switch_mlp.down_proj") is not None
    assert moments.of("model.layers.1.mlp.gate") is not None
    assert moments.of("lm_head") is not None


def test_sizes_after_a_sensitivity_without_a_profile(demo_model: Path) -> None:
    from mint_mlx import overview
    from mint_mlx.order import Request

    pipeline.get_sensitivity(prepare(str(demo_model)))
    _, rows = overview.size_table(Request(str(demo_model), effort="balanced"))
    assert len(rows) > 3 and rows[0].loss is None


def test_a_card_says_what_was_seen(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(1)))
    for number, (more, text) in enumerate(
        [
            ({"uniform": "4bit-g64", "quantizer": "gptq"}, "text that the model wrote itself"),
            ({"uniform": "4bit-g64"}, "weights only"),
            ({"budget": "5bpw", "effort": "balanced", "objective": "nmse", "quantizer": "rtn"}, "weights only"),
            ({"budget": "5bpw", "effort": "fast", "objective": "fisher"}, "text that the model wrote itself"),
        ]
    ):
        pipeline.convert(folder, out=tmp_path / str(number), smoke=False, **more)
        assert text in (tmp_path / str(number) / "README.md").read_text()


def test_a_sensitivity_replaces_nothing_else(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_text("precious")
    (tmp_path / "dir.npz").mkdir()
    folder = str(make(llama(1)))
    for name in ("mine.npz", "dir.npz", "nowhere/s.npz"):
        with pytest.raises(MintError):
            pipeline.write_sensitivity(folder, tmp_path / name)
    assert (tmp_path / "mine.npz").read_text() == "precious"


def test_what_cannot_be_kept_is_measured_once(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mint_mlx.sensitivity as module

    measured: list[int] = []
    true = module.measure
    monkeypatch.setattr(module, "measure", lambda *a, **k: measured.append(1) or true(*a, **k))
    monkeypatch.setattr("mint_mlx.cache.keep_sensitivity", _full)
    pipeline.convert(str(make(llama(1))), "5bpw", tmp_path / "out", effort="balanced", smoke=False)
    assert measured == [1]


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")
