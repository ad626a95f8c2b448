"""The model's own text, and the Fisher information that is measured on it."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import DENSE, write_family
from helpers import HIDDEN, TOKENS, Maker, Notes, llama, qwen3_moe
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from released import known, released

from mint_mlx.allocation.allocate import allocate
from mint_mlx.allocation.search_space import SearchSpace
from mint_mlx.base.errors import MintError
from mint_mlx.base.units import parse_budget
from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.quantizers.inputs import Moments, block_inputs
from mint_mlx.jobs import convert, measurements
from mint_mlx.jobs.model import prepare
from mint_mlx.measure import resume
from mint_mlx.measure import self_text as tokens_module
from mint_mlx.measure.self_text import resample, write_tokens
from mint_mlx.measure.sensitivity import check_chain, measure
from mint_mlx.measure.sensitivity_file import load_sensitivity, save_sensitivity
from mint_mlx.runtime import blocks, runner
from mint_mlx.runtime.blocks import NoChain
from mint_mlx.runtime.cpu_ops import on_cpu
from mint_mlx.runtime.memory import RESERVE

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
    monkeypatch.setattr(
        tokens_module, "resample", lambda *args: done.append(None) or resample(*args)
    )
    again, also = write_tokens(source, 2048, 256, length=64, streamed=True, place=place)
    np.testing.assert_array_equal(whole, again)
    assert also == how and len(done) == tokens_module.PASSES
    assert resume.read_tokens(place, "resampled") is not None
    resume.clear(place)
    assert not list(place.parent.iterdir())
    resume._tokens_file(place, "sampled-64").write_bytes(b"cut short")
    assert resume.read_tokens(place, "sampled-64") is None


def test_as_many_windows_are_sampled_at_once_as_memory_has_room_for(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, loaded = prepare(str(demo_model)).source, runner.load_runner(demo_model)
    weights = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    cache = make_prompt_cache(loaded.model)
    mx.eval(loaded.model(mx.zeros((8, 256), dtype=mx.int32), cache=cache))
    eight = sum(array.nbytes for block in cache for array in (block.keys, block.values))
    for left, windows in ((200, 64), (1.01, 4), (0, 1)):
        monkeypatch.setattr(
            tokens_module, "room", lambda left=left: RESERVE + weights + int(left * eight)
        )
        assert tokens_module.at_once(source, loaded, 256) == windows


def test_text_that_was_interrupted_while_sampled_goes_on_after_its_last_part(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "at_once", lambda *_: 3)
    source, place, drawn = prepare(str(make(llama(1)))).source, tmp_path / "s.npz", []
    whole, how = write_tokens(source, 96, 160, length=16, streamed=False)

    def progress(what: str, done: int, total: int) -> None:
        drawn.append(done)
        if len(drawn) == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(source, 96, 160, length=16, streamed=False, place=place, progress=progress)
    again, also = write_tokens(
        source, 96, 160, length=16, streamed=False, place=place, progress=progress
    )
    np.testing.assert_array_equal(whole, again)
    assert also == how and len(drawn) == 50 + 15  # three parts of four were there


@pytest.mark.parametrize(
    ("calls", "streamed", "error"),
    [
        *(
            (calls, streamed, KeyboardInterrupt)
            for calls in (1, 3, 4, 5)
            for streamed in (False, True)
        ),
        *((3, True, error) for error in (OSError, MemoryError, RuntimeError)),
    ],
)
def test_a_walk_that_was_interrupted_goes_on_to_the_same_numbers(
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
    streamed: bool,
    error: type[BaseException],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    job = prepare(str(make(qwen3_moe(3))))

    def walk(stop: int | None = None) -> tuple[Path, list[str]]:
        seen: list[str] = []

        def progress(what: str, *_: int) -> None:
            if len(seen) == stop:
                raise error
            seen.append(what)

        made = measure(
            job.source, job.inventory, TOKENS, "r", progress=progress, streamed=streamed, key="k"
        )
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        save_sensitivity(made, path)
        return path, seen

    whole, _ = walk()
    assert not list((tmp_path / "work").iterdir())
    with pytest.raises(error):
        walk(calls)
    (left,) = (tmp_path / "work").iterdir()
    assert (left.stat().st_mode & 0o77) == 0
    run_again = []
    run = blocks.run
    monkeypatch.setattr(
        blocks, "run", lambda step, *more: run_again.append(step.index) or run(step, *more)
    )
    again, _ = walk()
    assert whole.read_bytes() == again.read_bytes()
    assert run_again == list(range(calls, 3))
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.usefixtures("like_a_gpu")
def test_what_is_kept_of_a_walk_has_the_type_that_it_had(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms in float32 make all that comes after the first one float32, in a model of bfloat16."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = make(llama(3))
    tensors = mx.load(str(folder / "model.safetensors"))
    mixed = {name: a.astype(mx.float32) if "norm" in name else a for name, a in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), mixed, metadata={"format": "pt"})
    job = prepare(str(folder))

    def stop(what: str, done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    whole = measure(job.source, job.inventory, TOKENS, "r")
    with pytest.raises(KeyboardInterrupt):
        measure(job.source, job.inventory, TOKENS, "r", progress=stop, key="k")
    again = measure(job.source, job.inventory, TOKENS, "r", key="k")
    assert all((whole.trace[path] == again.trace[path]).all() for path in whole.trace)


def test_resampled_tokens_are_the_same_streamed_or_not(demo_model: Path) -> None:
    source = prepare(str(demo_model)).source
    tokens = np.random.default_rng(0).integers(0, 2048, (4, 64)).astype(np.int32)
    whole, streamed = (
        resample(runner.load_runner(source.path, s), tokens, mx.random.key(3))
        for s in (False, True)
    )
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
def test_the_walk_gives_the_whole_models_gradient(
    make: Maker, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    folder = make(llama(3))
    job = prepare(str(folder))
    monkeypatch.setattr(
        "mint_mlx.runtime.blocks.LOGITS", 1
    )  # one position at a time, so that labels can be handed out
    calls: list[int] = []

    def fixed(logits: mx.array, key: mx.array) -> mx.array:
        calls.append(0)  # each position is run twice: for the shapes, then for the gradient
        position = (len(calls) - 1) // 2
        return mx.array(LABELS[:, position : position + 1])

    monkeypatch.setattr(mx.random, "categorical", fixed)
    made = measure(
        job.source, job.inventory, TOKENS, "random", batch=len(TOKENS), streamed=streamed
    )
    for path in (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.up_proj",
        "lm_head",
    ):
        expected = whole_model_trace(folder, TOKENS, path)
        rough = (
            1e-3 if on_cpu() else 0.02
        )  # a GPU runs a model in the type that it is stored in, here bfloat16
        assert made.trace[path].sum() == pytest.approx(expected, rel=rough), path


def test_experts_are_told_apart_and_streaming_changes_nothing(make: Maker) -> None:
    job = prepare(str(make(qwen3_moe(2, experts=8))))
    whole, streamed = (
        measure(job.source, job.inventory, TOKENS, "r", batch=2, streamed=s) for s in (False, True)
    )
    down = "model.layers.1.mlp.switch_mlp.down_proj"
    assert whole.trace[down].shape == (8,) and len(set(whole.trace[down])) == 8
    assert (
        whole.weights[down].weight.shape == (TOKENS.size, 2)
        and whole.weights[down].part is not None
    )
    for path in whole.trace:
        np.testing.assert_allclose(whole.trace[path], streamed.trace[path], rtol=1e-4)
        assert whole.trace[path].sum() > 0


def test_what_blocks_read_must_fit_on_the_disk(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, free = prepare(str(make(qwen3_moe(2)))), TOKENS.size * HIDDEN * 4 * 3 - 1
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(MintError, match="--work-dir"):
        measure(job.source, job.inventory, TOKENS, "random", batch=2)


def test_the_prediction_is_near_the_divergence(demo_model: Path, tmp_path: Path) -> None:
    """At 5 bits per weight the predicted KL is within a factor of two of the measured one."""
    job = prepare(str(demo_model))
    tokens, how = write_tokens(job.source, 2048, 2048, length=64)
    curves, made = measurements.get_profile(job), measure(job.source, job.inventory, tokens, how)
    plan = allocate(
        curves,
        parse_budget("5bpw"),
        SearchSpace(job.inventory, job.recipe),
        "fisher",
        sensitivity=made,
    )
    convert.convert(str(demo_model), plan=plan, out=tmp_path / "out", smoke=False)
    fresh, _ = write_tokens(job.source, 2048, 2048, seed=9, length=64)
    logp = []
    for folder in (demo_model, tmp_path / "out"):
        logits = runner.load_runner(folder).model(mx.array(fresh)).astype(mx.float32)
        logp.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    divergence = float(mx.mean(mx.sum(mx.exp(logp[0]) * (logp[0] - logp[1]), axis=-1)).item())
    assert plan.loss is not None and plan.loss / 2 < divergence < plan.loss * 2


@pytest.mark.parametrize("family", ["gemma4_text", "hunyuan", *DENSE])
def test_a_model_that_is_no_chain_falls_back_to_its_weights(tmp_path: Path, family: str) -> None:
    if family == "bitnet" and mx.metal.is_available():
        pytest.skip("its kernels are here")
    pytest.importorskip(f"mlx_lm.models.{family}")
    folder = write_family(tmp_path / family, family)
    job = prepare(str(folder))
    with pytest.raises(NoChain):  # before it costs time
        check_chain(job.source, job.inventory)
    if family == "afm7":  # mlx-lm can't load it once it is quantized
        return
    notes = Notes()
    result = convert.convert(
        str(folder), "9bpw", tmp_path / "out", effort="balanced", smoke=False, report=notes
    )
    assert result.plan.objective == "prior" and result.plan.quantizer == "rtn"
    assert any("cannot be walked through" in note for note in notes.said)
    if family == "bitnet":
        told = convert.convert(
            str(folder), "9bpw", tmp_path / "spoken", effort="fast", report=notes
        )
        assert told.sentence is None and any("for Metal only" in note for note in notes.said)


def test_a_block_that_is_called_twice_is_not_streamed(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm.models.nanbeige")
    loaded = runner.load_runner(write_family(tmp_path / "model", "nanbeige"), streamed=True)
    with pytest.raises(MintError, match="calls one twice"):
        list(runner.forward(loaded, np.zeros((2, 4), dtype=np.int32), 2))


def test_heads_of_latent_attention_leave_no_row_for_every_token(tmp_path: Path) -> None:
    """They are rounded to nearest: what an error costs them is all that is asked."""
    job = prepare(str(write_family(tmp_path / "model", "deepseek_v3")))
    made = measure(
        job.source, job.inventory, np.random.default_rng(0).integers(0, 96, (2, 16)), "random"
    )
    heads = {layer.path for layer in job.inventory.layers if layer.kind == "multi-linear"}
    assert heads and all(made.trace[path].sum() > 0 for path in heads)
    assert not heads & (made.weights.keys() | made.left.keys())


def test_error_feedback_runs_experts_as_the_sensitivity_did(tmp_path: Path) -> None:
    """DBRX runs its experts token by token once it isn't trained: every row then had the first
    token's weight.
    """
    job = prepare(str(write_family(tmp_path / "model", "dbrx")))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 16))
    made = measure(job.source, job.inventory, tokens, "random")
    block, seen = next(block_inputs(job.source, job.inventory, made))
    weights = np.concatenate(
        [batch.weight for batch in seen["transformer.blocks.0.ffn.experts.0.w1"].batches]
    )
    assert block == 0 and len(set(weights.tolist())) > 0.9 * len(weights)


def test_one_direction_that_holds_nearly_everything(make: Maker, tmp_path: Path) -> None:
    """Rounding to 16 bits leaves such an embedding's moment without a factor."""
    config, shapes = llama(1)
    config |= {"tie_word_embeddings": True}
    folder = make(
        (config, {name: shape for name, shape in shapes.items() if not name.startswith("lm_head")})
    )
    weights = dict(mx.load(str(folder / "model.safetensors")))
    table = np.array(weights["model.embed_tokens.weight"].astype(mx.float32))
    table[:, :8] = 1 + 1e-3 * np.random.default_rng(0).standard_normal((len(table), 8))
    weights["model.embed_tokens.weight"] = mx.array(table).astype(mx.bfloat16)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * 0.05
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    result = convert.convert(str(folder), "6bpw", tmp_path / "out", effort="balanced", smoke=False)
    assert result.plan.objective == "fisher-gptq"


@pytest.mark.parametrize(
    "family", ["gpt_oss", "deepseek_v3", "qwen3_next", "llama4", "gemma3_text", "kimi_k2"]
)
def test_released_families_are_balanced(tmp_path: Path, family: str) -> None:
    """Sliding windows, latents, linear attention, chunks, tied heads and quantized sources: the
    whole level runs.
    """
    if not known(family):
        pytest.skip("this mlx-lm has no such family")
    folder = released(family, tmp_path / family)
    result = convert.convert(str(folder), "5bpw", tmp_path / "out", effort="balanced", smoke=False)
    assert (
        result.plan.objective == "fisher-gptq"
        and result.plan.quantizer == "gptq"
        and result.plan.effort == "balanced"
    )
    own = measurements.get_sensitivity(prepare(str(folder)))
    assert own is not None
    moments = Moments(load_source(str(folder)), result.inventory, own)
    followed = [
        layer.path for layer in result.inventory.layers if layer.kind in ("linear", "experts")
    ]
    assert [path for path in followed if moments.of(path) is None] == []


def test_a_sensitivity_survives_its_file(make: Maker, tmp_path: Path) -> None:
    job = prepare(str(make(qwen3_moe(1))))
    made = measure(job.source, job.inventory, TOKENS, "random")
    assert (
        made.metric.keys() == {0}
        and made.metric[0].shape == (128, 128)
        and made.embedding is not None
    )
    save_sensitivity(made, tmp_path / "s.npz")
    read = load_sensitivity(tmp_path / "s.npz")
    np.testing.assert_array_equal(read.tokens, TOKENS)
    assert (read.origin, read.how) == (made.origin, made.how)
    for path, trace in made.trace.items():
        np.testing.assert_array_equal(read.trace[path], trace)
    for path, weights in made.weights.items():
        np.testing.assert_array_equal(read.weights[path].weight, weights.weight)
        assert (read.weights[path].part is None) == (weights.part is None)
        if weights.part is not None:
            np.testing.assert_array_equal(read.weights[path].part, weights.part)
    np.testing.assert_array_equal(read.metric[0], made.metric[0])
    assert (
        read.left == made.left
        and made.left.keys() == made.trace.keys()
        and min(made.left.values()) < 0.999
    )
    np.testing.assert_array_equal(read.embedding, made.embedding)
    whole = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(whole[:500])
    with pytest.raises(MintError, match="is not a sensitivity"):
        load_sensitivity(tmp_path / "s.npz")
    for place in np.random.default_rng(0).integers(
        0, len(whole), 60
    ):  # a damaged one is refused, never a traceback
        (tmp_path / "s.npz").write_bytes(
            whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
        )
        with contextlib.suppress(MintError):
            load_sensitivity(tmp_path / "s.npz")


def test_a_sensitivity_of_another_model_is_refused(make: Maker) -> None:
    one, two = (prepare(str(make(llama(1), f"m{seed}", seed=seed))) for seed in (0, 1))
    made = measure(one.source, one.inventory, TOKENS, "random")
    with pytest.raises(MintError, match="another model"):
        allocate(
            measurements.get_profile(two),
            parse_budget("5bpw"),
            SearchSpace(two.inventory, two.recipe),
            "fisher",
            sensitivity=made,
        )
