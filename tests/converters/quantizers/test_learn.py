"""What is learned on the model's own text: rounding block by block, scales and biases end to end;
and what is kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import VOCAB, Cli, Maker, Notes, llama, qwen3_moe
from mlx_lm.models.switch_layers import SwitchLinear

from mint_mlx.allocation import sweep
from mint_mlx.allocation.sweep import Point
from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import QuantConfig, affine
from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.quantizers import gptq, learn_block, learn_model, learn_turns
from mint_mlx.converters.quantizers.learn_block import Block
from mint_mlx.converters.quantizers.learn_turns import learn_in_turns
from mint_mlx.jobs import convert, steps
from mint_mlx.jobs.refine import refine_checkpoint
from mint_mlx.measure.self_text import write_tokens
from mint_mlx.rules import efforts
from mint_mlx.runtime import runner
from mint_mlx.runtime.divergence import mean_merged_kl


def small_block(config: QuantConfig, seed: int = 0) -> Block:
    """One linear layer with correlated inputs, as a block."""
    rng = np.random.default_rng(seed)
    layer = nn.Linear(64, 32, bias=False)
    weight = mx.array(rng.normal(size=(32, 64)).astype(np.float32) * 0.1).astype(mx.bfloat16)
    x = (
        rng.normal(size=(16, 128, 64)) @ (rng.normal(size=(64, 64)) * np.geomspace(1, 0.1, 64))
    ).astype(np.float32)
    flat = x.reshape(-1, 64)
    codes = gptq.find_codes(weight, config, (flat.T @ flat / len(flat))[None])
    exact = weight.astype(mx.float32)
    g = rng.normal(size=(500, 32)) * np.geomspace(1, 0.1, 32)
    cost = partial(
        learn_block.metric_cost, learn_block.metric_root((g.T @ g / len(g)).astype(np.float32))
    )
    return Block(
        layer,
        {"layer": layer},
        {"layer": exact},
        {"layer": codes},
        mx.array(x),
        mx.array(x) @ exact.T,
        cost,
    )


def cost(block: Block, codes: learn_block.Codes) -> float:
    """The loss of a layer's written codes on the windows that are held out."""
    packed, config = codes.packed(), codes.config
    weight = mx.dequantize(
        packed["weight"], packed["scales"], packed["biases"], config.group_size, config.bits
    )
    return float(block.cost(block.inputs[-2:] @ weight.astype(mx.float32).T, block.targets[-2:]))


@pytest.mark.parametrize("config", affine((2, 3, 4, 6), (32, 64)), ids=str)
def test_learning_never_raises_the_loss_on_held_out_text(config: QuantConfig) -> None:
    block = small_block(config)
    start, found = block.start["layer"], learn_block.learn(block, steps=40)["layer"]
    assert cost(block, found) <= cost(block, start) * 1.01
    assert found.codes.dtype == np.uint8 and found.codes.max() < 2**config.bits
    assert found.scales.dtype == start.scales.dtype and found.scales.shape == start.scales.shape


def test_scales_and_biases_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_block, "LATENT", 0.0)
    block = small_block(QuantConfig(2, 32))
    start, found = block.start["layer"], learn_block.learn(block, steps=80)["layer"]
    np.testing.assert_array_equal(found.codes, start.codes)
    assert cost(block, found) < 0.95 * cost(block, start)


def test_learning_that_gains_nothing_gives_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_block, "LATENT", 50.0)  # throws codes from one end to the other
    total, losses = learn_block._total, []

    def recorded(*args: Any) -> float:
        losses.append(total(*args))
        return losses[-1]

    monkeypatch.setattr(learn_block, "_total", recorded)
    block = small_block(QuantConfig(4, 32))
    start, learned = block.start["layer"], learn_block.learn(block, steps=4)["layer"]

    # Each of the four looks at the held-out windows sees that what was learned is worse.
    assert len(losses) == 5
    assert min(losses[1:]) > 2 * losses[0]
    np.testing.assert_array_equal(learned.codes, start.codes)
    assert mx.array_equal(learned.scales, start.scales)
    assert mx.array_equal(learned.biases, start.biases)


def test_a_diagonal_metric_is_a_metric() -> None:
    metric = np.diag(np.arange(1.0, 9.0)).astype(np.float32)
    whole, diagonal = (
        learn_block.metric_root(metric),
        learn_block.metric_root(np.diagonal(metric).copy()),
    )
    np.testing.assert_allclose(np.diagonal(np.array(whole)), np.array(diagonal), rtol=1e-5)


def kl(model: Path, made: Path, text: np.ndarray) -> float:
    """Mean KL divergence by stock mlx-lm's own forward pass."""
    logp = []
    for folder in (model, made):
        logits = runner.load_runner(folder).model(mx.array(text)).astype(mx.float32)
        logp.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return float(mx.mean(mx.sum(mx.exp(logp[0]) * (logp[0] - logp[1]), axis=-1)))


def experts_block(config: QuantConfig) -> Block:
    """A layer of six experts, of which each token goes to two, and one layer before it."""
    rng = np.random.default_rng(7)
    first, stack = nn.Linear(64, 64, bias=False), SwitchLinear(64, 32, 6, bias=True)
    x = (
        rng.normal(size=(16, 64, 64)) @ (rng.normal(size=(64, 64)) * np.geomspace(1, 0.1, 64))
    ).astype(np.float32)
    chosen = mx.array(rng.integers(0, 6, size=(16, 64, 2)))

    def call(h: mx.array) -> mx.array:
        here = chosen[: len(h)]
        return mx.sum(stack(mx.expand_dims(first(h), (-2, -3)), here)[..., 0, :], axis=-2)

    modules = {"first": first, "stack": stack}
    exact = {path: module.weight for path, module in modules.items()}
    plain = np.eye(64, dtype=np.float32)[None]
    start = {
        "first": gptq.find_codes(first.weight, config, plain),
        "stack": gptq.find_codes(stack.weight, config, plain.repeat(6, axis=0)),
    }
    targets = call(mx.array(x))
    cost = partial(learn_block.metric_cost, mx.array(np.ones(32, dtype=np.float32)))
    return Block(call, modules, exact, start, mx.array(x), targets, cost)


def test_learning_in_turns_learns_all_experts_about_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learn_block, "STEPS", 60)
    monkeypatch.setattr(learn_block, "TOKENS", 512)
    monkeypatch.setattr(learn_block, "LATENT", 0.03)
    found = {}
    for count in (1, 3):
        block = experts_block(QuantConfig(3, 32))

        def put(path: str, codes: learn_block.Codes, block: Block = block) -> None:
            p, c = codes.packed(), codes.config
            block.modules[path].weight = mx.dequantize(
                p["weight"], p["scales"], p["biases"], c.group_size, c.bits
            )

        told: list[tuple[int, int]] = []
        learned = learn_in_turns(
            block,
            ["stack"],
            count,
            put,
            progress=lambda done, of, told=told: told.append((done, of)),
        )
        assert told == [
            (n + 1, count * learn_block.STEPS) for n in range(count * learn_block.STEPS)
        ]
        losses = []
        for codes in (block.start, learned):
            for path, code in codes.items():
                put(path, code)
            losses.append(float(block.cost(block.call(block.inputs[-2:]), block.targets[-2:])))
        found[count] = losses[1] / losses[0]
        for expert in range(6):
            assert (learned["stack"].codes[expert] != block.start["stack"].codes[expert]).any()
        assert (learned["first"].codes != block.start["first"].codes).any()
    assert found[3] < 1.1 * found[1] < 0.9


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_part_of_the_experts_takes_the_gradient_of_its_rows(bias: bool, ordered: bool) -> None:
    rng = np.random.default_rng(0)
    stack = SwitchLinear(16, 8, 5, bias=bias)
    whole, some = stack.weight, slice(1, 3)
    x = mx.array(rng.normal(size=(40, 1, 16)).astype(np.float32))
    chosen = rng.integers(0, 5, size=40)
    indices = mx.array(np.sort(chosen) if ordered else chosen)

    def loss(weight: mx.array, x: mx.array) -> mx.array:
        stack.weight = weight
        return mx.sum(mx.square(stack(x, indices, sorted_indices=ordered)))

    value, (to_weight, to_x) = mx.value_and_grad(loss, (0, 1))(whole, x)
    stack.weight = whole
    with learn_turns._only([(stack, some)]):
        here, (to_some, to_x_too) = mx.value_and_grad(loss, (0, 1))(whole[some], x)
    np.testing.assert_allclose(float(here), float(value), rtol=1e-5)
    np.testing.assert_allclose(np.array(to_some), np.array(to_weight[some]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(to_x_too), np.array(to_x), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_experts_reads_rows_that_follow_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLX multiplies other rows, silently, where the middle axis has a stride of its own.

    Seen on CUDA with 0.32.4, reported for Metal up to 0.32.0; a CPU takes any strides.
    """
    stack, stock, strides = SwitchLinear(16, 8, 5), mx.gather_mm, []

    def gather_mm(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        strides.append(memoryview(x).strides)  # type: ignore[arg-type]
        return stock(x, *args, **kwargs)

    monkeypatch.setattr(mx, "gather_mm", gather_mm)
    with learn_turns._only([(stack, slice(1, 3))]):
        stack.weight = stack.weight[1:3]
        mx.eval(stack(mx.ones((40, 1, 16)), mx.array(np.arange(40) // 8), sorted_indices=True))
    assert strides == [(64, 64, 4)] * 2


def test_best_beats_balanced_on_a_trained_model(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "TOKENS", 1024)
    monkeypatch.setattr(learn_block, "STEPS", 12)
    monkeypatch.setattr(learn_block, "TOKENS", 512)
    found = {}
    for effort in ("balanced", "best"):
        result = convert.convert(
            str(demo_model), "4bpw", tmp_path / effort, effort=effort, smoke=False
        )
        found[effort] = kl(demo_model, tmp_path / effort, demo_text)
    assert (result.plan.quantizer, result.plan.effort) == ("learn", "best")
    assert found["best"] < 0.9 * found["balanced"]


def test_best_streamed_is_best(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is read block by block: the same plan, and nearly the same weights."""
    folder = make(qwen3_moe(2, experts=8))
    convert.convert(str(folder), "5bpw", tmp_path / "whole", effort="best", smoke=False)
    monkeypatch.setattr(runner, "fits_here", lambda size: False)
    notes = Notes()
    result = convert.convert(
        str(folder), "5bpw", tmp_path / "streamed", effort="best", smoke=False, report=notes
    )
    assert result.plan.quantizer == "learn"
    told = [
        f"{part} learns, step {step + 1} of {learn_block.STEPS}"
        for part in ("block 0", "block 1", "head")
        for step in range(learn_block.STEPS)
    ]
    assert notes.details == told
    blocks = [
        runner.load_runner(tmp_path / n, False).model.layers[1] for n in ("whole", "streamed")
    ]
    for weights in zip(
        *((b.self_attn.v_proj.weight, b.mlp.switch_mlp.up_proj.weight) for b in blocks), strict=True
    ):
        one, two = map(np.array, weights)
        np.testing.assert_allclose(one, two, atol=0.1 * one.std())


@pytest.mark.parametrize("stored", [None, "8bit-g32"])
def test_best_takes_the_ways_of_a_gpu(
    like_a_gpu: None,
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str | None,
) -> None:
    monkeypatch.setattr(learn_block, "STEPS", 6)
    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.STEPS", 6)
    folder = make(llama(2))
    if stored:
        folder = convert.convert(
            str(folder), None, tmp_path / "stored", uniform=stored, smoke=False
        ).path
    for effort in ("balanced", "best"):
        convert.convert(str(folder), "4bpw", tmp_path / effort, effort=effort, smoke=False)
    tokens = write_tokens(load_source(str(folder)), VOCAB, 512, seed=5)[0]
    assert kl(folder, tmp_path / "best", tokens) < 0.95 * kl(folder, tmp_path / "balanced", tokens)


def test_best_in_turns_is_near_best(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_block, "STEPS", 8)
    monkeypatch.setattr(learn_block, "LATENT", 0.02)  # so few steps of the usual size move no code
    monkeypatch.setattr(learn_block, "TOKENS", 2048)  # so that every expert has some
    monkeypatch.setattr(efforts, "TOKENS", 2048)
    monkeypatch.setattr("mint_mlx.measure.self_text.LENGTH", 256)
    folder, notes = make(qwen3_moe(1, experts=8)), Notes()
    convert.convert(str(folder), "4bpw", tmp_path / "whole", effort="best", smoke=False)
    monkeypatch.setattr(learn_model, "turns", lambda inventory, tokens: 4)
    convert.convert(
        str(folder), "4bpw", tmp_path / "turns", effort="best", smoke=False, report=notes
    )
    steps = 4 * learn_block.STEPS
    assert [d for d in notes.details if d.startswith("block 0")][
        -1
    ] == f"block 0 learns, step {steps} of {steps}"
    monkeypatch.setattr(learn_model, "learn_in_turns", lambda block, *_: block.start)
    convert.convert(str(folder), "4bpw", tmp_path / "start", effort="best", smoke=False)
    paths = [f"model.layers.0.mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
    dense = [
        runner.make_dense(runner.load_runner(tmp_path / n, False), paths)
        for n in ("whole", "turns", "start")
    ]
    for path in paths:
        whole, turns, start = (np.array(stacks[path].weight) for stacks in dense)
        assert (np.abs(turns - start).max(axis=(1, 2)) > 0).all()  # experts of every turn
        assert np.abs(turns - whole).mean() < np.abs(whole).mean() / 4


# Refining


def test_refining_keeps_codes_and_bytes_and_comes_closer(
    demo_model: Path, demo_text: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 2048)
    convert.convert(str(demo_model), uniform="4bit-g64", out=tmp_path / "uniform", smoke=False)
    path, found = refine_checkpoint(
        str(tmp_path / "uniform"), str(demo_model), tmp_path / "refined", steps=40
    )
    assert found.after < 0.9 * found.before
    assert kl(demo_model, path, demo_text) < 0.9 * kl(demo_model, tmp_path / "uniform", demo_text)
    one, two = (
        mx.load(str(tmp_path / name / "model.safetensors")) for name in ("uniform", "refined")
    )
    changed = {name for name in one if not mx.array_equal(one[name], two[name])}
    assert changed and all(name.endswith((".scales", ".biases")) for name in changed)
    assert {n: (a.shape, a.dtype) for n, a in one.items()} == {
        n: (a.shape, a.dtype) for n, a in two.items()
    }
    names = [sorted(f.name for f in (tmp_path / name).iterdir()) for name in ("uniform", "refined")]
    assert set(names[1]) - set(names[0]) == {"mint-refined.json"} and set(names[0]) <= set(names[1])
    card = (path / "README.md").read_text()
    assert (
        'load("refined")' in card
        and "--model refined" in card
        and "then refined" in card
        and "# uniform" not in card
    )


def test_refining_that_gains_nothing_writes_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    convert.convert(str(folder), uniform="8bit-g32", out=tmp_path / "made", smoke=False)
    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.RATE", 10.0)
    with pytest.raises(MintError, match="gained nothing"):
        refine_checkpoint(str(tmp_path / "made"), str(folder), tmp_path / "out", steps=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == []


def test_what_cannot_be_refined(make: Maker, tmp_path: Path) -> None:
    folder, other, made = make(llama(1)), make(llama(2), "other"), tmp_path / "made"
    convert.convert(str(folder), uniform="4bit-g32", out=made, smoke=False)
    for given, source, why in (
        (folder, folder, "no layer with scales"),
        (made, other, "was not made from"),
        (made, made, "is its own source"),
    ):
        with pytest.raises(MintError, match=why):
            refine_checkpoint(str(given), str(source), tmp_path / "out")


def test_an_operation_without_a_gradient_is_named(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    convert.convert(folder, uniform="4bit-g32", out=tmp_path / "made", smoke=False)
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 256)
    norm = nn.RMSNorm.__call__
    stiff = lambda self, x: norm(self, x) + 0 * mx.linalg.qr(x[0], stream=mx.cpu)[1].sum()  # noqa: E731
    monkeypatch.setattr(nn.RMSNorm, "__call__", stiff)
    with pytest.raises(MintError, match=r"no gradient in MLX .*QRF"):
        refine_checkpoint(str(tmp_path / "made"), folder, tmp_path / "out", steps=1)
    assert not (tmp_path / "out").exists()


def test_the_divergence_is_that_of_all_tokens() -> None:
    """Where every token is among the source's best, nothing is lumped together."""
    rng = np.random.default_rng(0)
    p, q = (mx.array(rng.normal(size=(2, 3, 8)).astype(np.float32)) for _ in range(2))
    logp, logq = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (p, q))
    ids = mx.broadcast_to(mx.arange(8), (2, 3, 8))
    exact = float(mx.mean(mx.sum(mx.exp(logp) * (logp - logq), axis=-1)))
    assert float(mean_merged_kl(q, ids, logp)) == pytest.approx(exact, rel=1e-4)
    few = mx.argsort(-logp, axis=-1)[..., :3]
    lumped = float(mean_merged_kl(q, few, mx.take_along_axis(logp, few, axis=-1)))
    assert 0 < lumped < exact


# What is kept


def test_a_checkpoint_keeps_what_made_it(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(1)))
    first = convert.convert(folder, "5bpw", tmp_path / "a", effort="balanced", smoke=False)
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(
        "mint_mlx.measure.sensitivity.measure", None
    )  # the hours are not spent again
    again = convert.convert(
        folder, "5bpw", tmp_path / "b", effort="balanced", sensitivity=tmp_path / "a", smoke=False
    )
    assert first.plan.choice == again.plan.choice
    third = convert.convert(
        folder,
        plan=str(tmp_path / "a"),
        out=tmp_path / "c",
        sensitivity=tmp_path / "b",
        smoke=False,
    )
    assert third.plan.quantizer == "gptq"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]
    plan, _ = steps.plan_profile(str(tmp_path / "a"), "5bpw", sensitivity=str(tmp_path / "a"))
    assert plan.choice == first.plan.choice


def test_a_kept_sensitivity_that_does_not_serve(make: Maker, tmp_path: Path) -> None:
    one, two = (str(make(llama(1), f"m{seed}", seed=seed)) for seed in (0, 1))
    convert.convert(one, "6bpw", tmp_path / "a", effort="balanced", smoke=False)
    with pytest.raises(MintError, match="another model"):
        convert.convert(
            two, "6bpw", tmp_path / "b", effort="balanced", sensitivity=tmp_path / "a", smoke=False
        )
    with pytest.raises(MintError, match="no use"):
        convert.convert(
            one, "6bpw", tmp_path / "b", effort="fast", sensitivity=tmp_path / "a", smoke=False
        )
    convert.convert(one, "6bpw", tmp_path / "fast", effort="fast", smoke=False)
    with pytest.raises(MintError, match="holds no mint-sensitivity"):
        convert.convert(
            one,
            "6bpw",
            tmp_path / "b",
            effort="balanced",
            sensitivity=tmp_path / "fast",
            smoke=False,
        )


# Sweeping


def test_the_knee_is_where_a_curve_bends() -> None:
    points = [Point(100 + 10 * i, 1.0, 1.0 if i == 0 else 0.05 - 0.001 * i) for i in range(8)]
    assert sweep.knee(points) == 1
    assert sweep.knee(points[:2]) == 0


def test_a_sweep_goes_from_the_smallest_to_the_largest(make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    convert.convert(folder, "5bpw", tmp_path / "made", effort="balanced", smoke=False)
    found = sweep.sweep(tmp_path / "made", measured=("5bpw:7.5",))
    sizes, losses = [p.bytes for p in found.points], [p.loss for p in found.points]
    assert (
        sizes == sorted(sizes)
        and losses == sorted(losses, reverse=True)
        and found.objective == "fisher-gptq"
    )
    assert any("measured 7.5" in row[3] for row in sweep.sweep_rows(found)[1])
    short = sweep.sweep(
        tmp_path / "made", measured=(f"{sizes[3] - 2}B:9",)
    )  # a size that is nearly the fourth
    assert "measured 9" in sweep.sweep_rows(short)[1][3][3]
    sweep.draw(found, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    assert sweep.sweep(tmp_path / "made" / "mint-profile.json").objective == "prior"


@pytest.mark.parametrize("text", ["5bpw", "5bpw:", "smallest:3", "5bpw:-1", "x:3"])
def test_measured_points_that_are_none(make: Maker, tmp_path: Path, text: str) -> None:
    path, _ = steps.write_profile(str(make(llama(1))), tmp_path / "p.json")
    with pytest.raises(MintError):
        sweep.sweep(path, measured=(text,))


def test_refine_and_sweep_on_the_command_line(
    cli: Cli, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 2048)
    result, out = tmp_path / "result", tmp_path / "out"
    assert cli("convert", demo_model, "--budget", "4bpw", "-o", result, "--no-smoke").code == 0
    refine = ("refine", result, "--source", demo_model, "-o", out)
    refined = cli(*refine, "--steps", "4")
    assert refined.code == 0
    assert "KL from the source" in refined.out
    refused = cli(*refine)
    assert refused.code == 1
    assert "exists already" in refused.err
    assert cli("sweep", out, "--plot", tmp_path / "s.txt").code == 1
    assert cli("sweep", out).code == 0
