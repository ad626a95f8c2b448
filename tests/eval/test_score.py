"""Scores, held against a forward pass written out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, llama, qwen3_moe
from scoring import EXACT, RANDOM, full_logp, predictions_of, score_of

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint import mlxlm
from mint_mlx.eval import reference, stats
from mint_mlx.eval.protocol import Windows
from mint_mlx.eval.score import score
from mint_mlx.jobs import convert
from mint_mlx.runtime import forward, runner
from mint_mlx.runtime.device import on_cpu

MODELS = pytest.mark.parametrize("model", [llama(2), qwen3_moe(2)], ids=["llama", "qwen3_moe"])


# Likelihoods


def numpy_llama(weights: dict[str, np.ndarray], tokens: np.ndarray, layers: int) -> np.ndarray:
    """Log-probabilities (tokens, vocabulary) of helpers' llama or qwen3_moe, in float64.

    `tokens` is one window.
    """

    def norm(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w

    def rope(x: np.ndarray) -> np.ndarray:  # (heads, tokens, 32)
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos = np.cos(angle)
        sin = np.sin(angle)
        a = x[..., :half]
        b = x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def swiglu(x: np.ndarray, p: str) -> np.ndarray:
        gate = x @ weights[f"{p}.gate_proj.weight"].T
        up = x @ weights[f"{p}.up_proj.weight"].T
        return (gate / (1 + np.exp(-gate)) * up) @ weights[f"{p}.down_proj.weight"].T

    h = weights["model.embed_tokens.weight"][tokens]
    n = len(tokens)
    mask = np.where(np.tril(np.ones((n, n))) > 0, 0, -np.inf)
    for i in range(layers):
        p = f"model.layers.{i}"

        # Attention, two heads a key.
        x = norm(h, weights[f"{p}.input_layernorm.weight"])
        q, k, v = (
            (x @ weights[f"{p}.self_attn.{c}_proj.weight"].T).reshape(n, -1, 32).transpose(1, 0, 2)
            for c in "qkv"
        )
        if f"{p}.self_attn.q_norm.weight" in weights:
            q = norm(q, weights[f"{p}.self_attn.q_norm.weight"])
            k = norm(k, weights[f"{p}.self_attn.k_norm.weight"])
        k = np.repeat(rope(k), 2, 0)
        v = np.repeat(v, 2, 0)
        mixed = softmax(rope(q) @ k.transpose(0, 2, 1) / np.sqrt(32) + mask) @ v
        h = h + mixed.transpose(1, 0, 2).reshape(n, -1) @ weights[f"{p}.self_attn.o_proj.weight"].T

        # The MLP, or the two best of its experts.
        x = norm(h, weights[f"{p}.post_attention_layernorm.weight"])
        if f"{p}.mlp.gate.weight" in weights:
            share = softmax(x @ weights[f"{p}.mlp.gate.weight"].T)
            out = np.zeros_like(x)
            for t in range(n):
                best = np.argsort(-share[t])[:2]
                for e in best:
                    out[t] += (
                        share[t, e] / share[t, best].sum() * swiglu(x[t], f"{p}.mlp.experts.{e}")
                    )
            h = h + out
        else:
            h = h + swiglu(x, f"{p}.mlp")
    logits = norm(h, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    return np.log(softmax(logits))


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by name, in float64."""
    stored = mx.load(str(folder / "model.safetensors"))
    return {k: np.array(v.astype(mx.float32), dtype=np.float64) for k, v in stored.items()}


@MODELS
@pytest.mark.parametrize("streamed", [False, True], ids=["in_memory", "streamed"])
def test_scores_equal_a_forward_pass_by_hand(
    make: Maker, model: tuple[dict, dict], streamed: bool
) -> None:
    folder = make(model, dtype=EXACT)
    weights = weights_of(folder)
    scores = score_of(folder, RANDOM, streamed=streamed).nll
    for window, nll in zip(RANDOM.tokens, scores, strict=True):
        logp = numpy_llama(weights, window, 2)
        np.testing.assert_allclose(nll, -logp[np.arange(23), window[1:]], rtol=1e-3, atol=1e-4)


def test_logits_come_in_pieces_of_bounded_size(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    whole = score_of(folder, RANDOM).nll
    most = 96 * 2 * 5
    monkeypatch.setattr(forward, "LOGITS", most)
    sizes = [p.logits.size for p in forward.forward(runner.load_runner(folder), RANDOM.tokens, 2)]
    assert max(sizes) <= most
    assert len(sizes) > 8
    np.testing.assert_allclose(score_of(folder, RANDOM).nll, whole, atol=1e-5)


def test_the_llama_cpp_protocol_scores_the_second_half(make: Maker) -> None:
    folder = make(llama(1))
    half = Windows(RANDOM.tokens, first=13)
    whole = score_of(folder, RANDOM).nll
    np.testing.assert_allclose(score_of(folder, half).nll, whole[:, 12:], atol=1e-5)


def test_logits_of_a_model_in_16_bits_are_not_rounded_to_them(make: Maker) -> None:
    """As models run on a GPU.

    A bfloat16 of 20 is off by up to .06, more than the whole divergence of 8 bits.
    """
    loaded = runner.load_runner(make(llama(2)))
    loaded.model.set_dtype(mx.bfloat16)
    for piece in forward.forward(loaded, RANDOM.tokens, 2):
        rounded = piece.logits.astype(mx.bfloat16).astype(mx.float32)
        assert piece.logits.dtype == mx.float32
        assert mx.mean(rounded == piece.logits).item() < 0.1


def test_streaming_changes_no_figure(make: Maker) -> None:
    source = make(qwen3_moe(2))
    in_memory = predictions_of(source, RANDOM)
    streamed = predictions_of(source, RANDOM, streamed=True)
    np.testing.assert_allclose(streamed.true, in_memory.true, atol=1e-5)
    routing = zip(streamed.routing, in_memory.routing, strict=True)
    assert all(np.array_equal(a, b) for a, b in routing)
    assert in_memory.routing[0].shape == (3, 24, 2)
    assert len(in_memory.routing) == 2


@pytest.mark.skipif(not on_cpu(), reason="a GPU runs quantized layers themselves")
def test_a_quantized_checkpoint_runs_as_its_source_with_dequantized_weights(
    make: Maker, tmp_path: Path
) -> None:
    folder = make(qwen3_moe(2))
    result = convert.convert(str(folder), "5bpw", tmp_path / "out", smoke=False)

    # The source with the weights that the checkpoint stands for.
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    stock = mlxlm.build_model(folder)
    for path, config in result.plan.choice.items():
        if config.quantized:
            packed = [written[f"{path}.{name}"] for name in ("weight", "scales", "biases")]
            weight = mx.dequantize(*packed, group_size=config.group_size, bits=config.bits)
            stock.load_weights([(f"{path}.weight", weight)], strict=False)
    stock.set_dtype(mx.float32)

    tokens = mx.array(RANDOM.tokens)
    dense = runner.load_runner(tmp_path / "out").model
    np.testing.assert_allclose(
        np.array(dense(tokens)), np.array(stock(tokens)), rtol=1e-3, atol=1e-3
    )


# Divergences


@MODELS
def test_divergence_equals_its_definition(
    make: Maker, tmp_path: Path, model: tuple[dict, dict]
) -> None:
    source = make(model, dtype=EXACT)
    convert.convert(str(source), "5bpw", tmp_path / "out", smoke=False)
    predictions = predictions_of(source, RANDOM)
    score = score_of(tmp_path / "out", RANDOM, predictions)

    p, q = (full_logp(folder) for folder in (source, tmp_path / "out"))
    kl = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(score.kl, kl, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(score.top1, p.argmax(-1) == q.argmax(-1))

    targets = RANDOM.tokens[:, 1:, None]
    true_p, true_q = (np.take_along_axis(x[:, :-1], targets, -1)[..., 0] for x in (p, q))
    np.testing.assert_allclose(score.dp, np.exp(true_q) - np.exp(true_p), atol=1e-5)

    figures = stats.divergence_figures([score], [predictions])
    assert figures["kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert figures["ln_ppl_difference"] == pytest.approx((true_p - true_q).mean(), abs=1e-5)


def test_merged_rare_tokens_lower_the_divergence_by_what_is_reported(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(llama(2))
    convert.convert(str(source), "4.2bpw", tmp_path / "out", smoke=False)
    exact = score_of(tmp_path / "out", RANDOM, predictions_of(source, RANDOM))

    # Every position is stored whole, so that the reported error is exact.
    monkeypatch.setattr(reference, "LEAST_K", 8)
    monkeypatch.setattr(reference, "WHOLE", 10**6)
    few = predictions_of(source, RANDOM, scored=10**12)
    assert few.ids.shape[1] == 8

    merged = score_of(tmp_path / "out", RANDOM, few)
    assert (merged.kl <= exact.kl + 1e-6).all()
    figures = stats.divergence_figures([merged], [few])
    assert figures["kl"] + figures["kl_merging_error"] == pytest.approx(exact.kl.mean(), rel=1e-4)
    assert score_of(source, RANDOM, few).kl == pytest.approx(0, abs=1e-6)


def test_an_interruption_gives_the_figures_so_far(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = runner.load_runner(make(qwen3_moe(1)))
    routing = forward.Routing()
    predictions = reference.predict(loaded, RANDOM, 1, batch=1, routing=routing)
    hidden = runner.trunk_output
    calls = []

    def interrupt(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hidden(*args)

    monkeypatch.setattr(forward, "trunk_output", interrupt)
    so_far = score(loaded, RANDOM, 1, predictions)
    assert so_far.finished == 2
    assert so_far.nll.shape == (2, 23)
    assert so_far.kl.shape == (2, 24)
    assert len(so_far.routing[0]) == 2
    assert stats.divergence_figures([so_far], [predictions])["kl"] == pytest.approx(0, abs=1e-6)


# Models that do not belong together


def test_a_vocabulary_smaller_than_the_sources_is_refused(make: Maker) -> None:
    """Also where none of the missing tokens is among the likely ones that are stored."""
    folder = make(llama(1))
    predictions = predictions_of(folder, RANDOM)
    more = np.pad(predictions.whole_logp, ((0, 0), (0, 8)), constant_values=-50)
    with pytest.raises(MintError, match="vocabulary is smaller"):
        score_of(folder, RANDOM, replace(predictions, whole_logp=more))


def test_a_padded_vocabulary_is_compared(make: Maker) -> None:
    source = make(llama(1), "a")
    config, shapes = llama(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shapes[name] = (128, 128)
    padded = make((config | {"vocab_size": 128}, shapes), "b")

    # The same weights, and 32 tokens whose logit is zero.
    weights = mx.load(str(source / "model.safetensors"))
    wide = mx.load(str(padded / "model.safetensors"))
    for name, weight in weights.items():
        if wide[name].shape != weight.shape:
            weight = mx.concatenate([weight, mx.zeros((32, 128), weight.dtype)])
        wide[name] = weight
    mx.eval(wide)
    mx.save_safetensors(str(padded / "model.safetensors"), wide)

    # These take their share.
    kl = score_of(padded, RANDOM, predictions_of(source, RANDOM)).kl
    assert np.isfinite(kl).all()
    assert 0 < kl.mean() < 0.5


def test_another_model_is_refused_not_scored(make: Maker) -> None:
    predictions = predictions_of(make(qwen3_moe(2), "a"), RANDOM)
    for other in (make(llama(2), "b"), make(qwen3_moe(1), "c")):
        with pytest.raises(MintError, match="not the same model"):
            score_of(other, RANDOM, predictions)
    with pytest.raises(MintError, match="token 500"):
        score_of(make(llama(1), "d"), Windows(np.full((1, 8), 500, dtype=np.int32)))


def test_damaged_weights_are_noticed(make: Maker) -> None:
    loaded = runner.load_runner(make(llama(1)))
    loaded.model.model.norm.weight = loaded.model.model.norm.weight * float("nan")
    with pytest.raises(MintError, match="not finite"):
        score(loaded, RANDOM, 1)
