"""Perplexity, held against a forward pass written out by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import Maker, Notes, llama, qwen3_moe
from released import released
from safetensors import SafetensorError

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.checkpoint import mlxlm
from mint_mlx.eval import chat, reference, score, stats, text
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.eval.protocol import Windows, cut
from mint_mlx.eval.reference import Predictions
from mint_mlx.eval.settings import Settings
from mint_mlx.eval.speed import speed
from mint_mlx.jobs import convert
from mint_mlx.runtime import runner
from mint_mlx.runtime.cpu_ops import on_cpu


def test_wikitext_is_the_real_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(text.wikitext().encode()) == 1_290_590
    monkeypatch.setattr(text, "WIKITEXT_SHA256", "0" * 64)
    with pytest.raises(MintError, match="damaged"):
        text.wikitext()


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe9")
    with pytest.raises(MintError, match="UTF-8"):
        text.read_text(str(tmp_path / "latin.txt"))
    with pytest.raises(MintError, match="no text file"):
        text.read_text(str(tmp_path / "none.txt"))


def numpy_llama(weights: dict[str, np.ndarray], tokens: np.ndarray, layers: int) -> np.ndarray:
    """Log-probabilities (tokens, vocabulary) of helpers' llama or qwen3_moe for one window, in
    float64.
    """

    def norm(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w

    def rope(x: np.ndarray) -> np.ndarray:  # (heads, tokens, 32)
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
        )

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def swiglu(x: np.ndarray, p: str) -> np.ndarray:
        gate = x @ weights[f"{p}.gate_proj.weight"].T
        return (gate / (1 + np.exp(-gate)) * (x @ weights[f"{p}.up_proj.weight"].T)) @ weights[
            f"{p}.down_proj.weight"
        ].T

    h = weights["model.embed_tokens.weight"][tokens]
    n = len(tokens)
    mask = np.where(np.tril(np.ones((n, n))) > 0, 0, -np.inf)
    for i in range(layers):
        p = f"model.layers.{i}"
        x = norm(h, weights[f"{p}.input_layernorm.weight"])
        q, k, v = (
            (x @ weights[f"{p}.self_attn.{c}_proj.weight"].T).reshape(n, -1, 32).transpose(1, 0, 2)
            for c in "qkv"
        )
        if f"{p}.self_attn.q_norm.weight" in weights:
            q, k = (
                norm(q, weights[f"{p}.self_attn.q_norm.weight"]),
                norm(k, weights[f"{p}.self_attn.k_norm.weight"]),
            )
        q, k = rope(q), rope(k)
        k, v = np.repeat(k, 2, 0), np.repeat(v, 2, 0)
        mixed = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(32) + mask) @ v
        h = h + mixed.transpose(1, 0, 2).reshape(n, -1) @ weights[f"{p}.self_attn.o_proj.weight"].T
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
    stored = mx.load(str(folder / "model.safetensors"))
    return {k: np.array(v.astype(mx.float32), dtype=np.float64) for k, v in stored.items()}


def run(
    folder: Path,
    windows: Windows,
    batch: int = 2,
    streamed: bool = False,
    part: Predictions | None = None,
) -> score.Score:
    return score.score(runner.load_runner(folder, streamed), windows, batch, part)


def predictions(
    folder: Path, windows: Windows, streamed: bool = False, scored: int = 1
) -> Predictions:
    return reference.predict(
        runner.load_runner(folder, streamed), windows, scored, batch=2, routing=runner.Routing()
    )


RANDOM = Windows(np.random.default_rng(0).integers(0, 96, (3, 24)).astype(np.int32))
EXACT = (
    mx.bfloat16 if on_cpu() else mx.float32
)  # a GPU runs a model in the type that it is stored in
MODELS = pytest.mark.parametrize("model", [llama(2), qwen3_moe(2)], ids=["llama", "qwen3_moe"])


@MODELS
@pytest.mark.parametrize("streamed", [False, True], ids=["in_memory", "streamed"])
def test_scores_equal_a_forward_pass_by_hand(
    make: Maker, model: tuple[dict, dict], streamed: bool
) -> None:
    folder = make(model, dtype=EXACT)
    weights = weights_of(folder)
    found = run(folder, RANDOM, streamed=streamed)
    for window, nll in zip(RANDOM.tokens, found.nll, strict=True):
        logp = numpy_llama(weights, window, 2)
        np.testing.assert_allclose(nll, -logp[np.arange(23), window[1:]], rtol=1e-3, atol=1e-4)


def test_logits_come_in_pieces_of_bounded_size(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    whole = run(folder, RANDOM).nll
    monkeypatch.setattr(runner, "LOGITS", 96 * 2 * 5)
    sizes = [p.logits.size for p in runner.forward(runner.load_runner(folder), RANDOM.tokens, 2)]
    assert max(sizes) <= 96 * 2 * 5 and len(sizes) > 8
    np.testing.assert_allclose(run(folder, RANDOM).nll, whole, atol=1e-5)


@MODELS
def test_divergence_equals_its_definition(
    make: Maker, tmp_path: Path, model: tuple[dict, dict]
) -> None:
    source = make(model, dtype=EXACT)
    convert.convert(str(source), "5bpw", tmp_path / "out", smoke=False)
    found = run(tmp_path / "out", RANDOM, part=predictions(source, RANDOM))
    p, q = (full_logp(folder) for folder in (source, tmp_path / "out"))
    kl = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=1e-6)
    targets = RANDOM.tokens[:, 1:, None]
    true_p, true_q = (np.take_along_axis(x[:, :-1], targets, -1)[..., 0] for x in (p, q))
    np.testing.assert_allclose(found.dp, np.exp(true_q) - np.exp(true_p), atol=1e-5)
    np.testing.assert_array_equal(found.top1, p.argmax(-1) == q.argmax(-1))
    figures = stats.divergence_figures([found], [predictions(source, RANDOM)])
    assert figures["kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert figures["ln_ppl_difference"] == pytest.approx((true_p - true_q).mean(), abs=1e-5)


def full_logp(folder: Path) -> np.ndarray:
    """Log-probabilities (windows, positions, vocabulary), in float64."""
    loaded = runner.load_runner(folder)
    logits = np.array(loaded.model(mx.array(RANDOM.tokens)).astype(mx.float32), dtype=np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_merged_rare_tokens_lower_the_divergence_by_what_is_reported(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(llama(2))
    convert.convert(str(source), "4.2bpw", tmp_path / "out", smoke=False)
    exact = run(tmp_path / "out", RANDOM, part=predictions(source, RANDOM))
    monkeypatch.setattr(reference, "LEAST_K", 8)
    monkeypatch.setattr(
        reference, "WHOLE", 10**6
    )  # every position, so that the reported error is exact
    few = predictions(source, RANDOM, scored=10**12)
    assert few.ids.shape[1] == 8
    merged = run(tmp_path / "out", RANDOM, part=few)
    assert (merged.kl <= exact.kl + 1e-6).all()
    figures = stats.divergence_figures([merged], [few])
    assert figures["kl"] + figures["kl_merging_error"] == pytest.approx(exact.kl.mean(), rel=1e-4)
    assert run(source, RANDOM, part=few).kl == pytest.approx(0, abs=1e-6)


def test_a_model_against_itself_is_below_the_noise_floor(make: Maker, tmp_path: Path) -> None:
    source = make(qwen3_moe(2))
    (tmp_path / "t.txt").write_text("the quick brown fox " * 40)
    settings = Settings(length=32, text=str(tmp_path / "t.txt"))
    same = evaluate(str(source), settings, source=str(source))
    assert (
        same["kl"] < same["noise_floor"] and same["same_top1"] == 1 and same["router_changes"] == 0
    )
    saved_twice = make(qwen3_moe(2), "copy")
    again = evaluate(str(saved_twice), settings, source=str(source))
    drop = {"model", "seconds", "tokens_per_second", "peak_memory"}
    assert {k: v for k, v in again.items() if k not in drop} == {
        k: v for k, v in same.items() if k not in drop
    }


def test_streaming_changes_no_figure(make: Maker) -> None:
    source = make(qwen3_moe(2))
    stored, streamed = predictions(source, RANDOM), predictions(source, RANDOM, streamed=True)
    np.testing.assert_allclose(streamed.true, stored.true, atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(streamed.routing, stored.routing, strict=True))
    assert stored.routing[0].shape == (3, 24, 2) and len(stored.routing) == 2


def test_changed_experts_are_counted(make: Maker) -> None:
    source = make(qwen3_moe(2))
    part = predictions(source, RANDOM)
    found = run(source, RANDOM, part=part)
    found.routing[0][0, :6] = 3 - found.routing[0][0, :6][:, ::-1]
    changed = (np.stack(found.routing) != np.stack(part.routing)).any(-1).mean()
    figures = stats.divergence_figures([found], [part])
    assert changed > 0 and figures["router_changes"] == pytest.approx(changed)


def test_a_reference_is_portable(make: Maker, tmp_path: Path) -> None:
    source = make(qwen3_moe(1))
    convert.convert(str(source), "6bpw", tmp_path / "out", smoke=False)
    (tmp_path / "t.txt").write_text("pack my box with five dozen jugs " * 20)
    settings, file = Settings(length=32, text=str(tmp_path / "t.txt")), tmp_path / "r.safetensors"
    first = evaluate(str(tmp_path / "out"), settings, source=str(source), save=file)
    (usual := tmp_path / "usual").touch()
    assert file.stat().st_mode == usual.stat().st_mode
    (source / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="its own text"):
        evaluate(str(tmp_path / "out"), settings, source=str(file))
    again = evaluate(str(tmp_path / "out"), source=str(file))
    assert again["kl"] == first["kl"] > 0 and again["text"] == first["text"] == "t.txt"
    (tmp_path / "precious.safetensors").write_text("x")
    for wrong in (
        tmp_path,
        tmp_path / "precious.safetensors",
        tmp_path / "x.txt",
        tmp_path / "no" / "x.safetensors",
    ):
        with pytest.raises(MintError):
            evaluate(str(tmp_path / "out"), settings, source=str(tmp_path / "nowhere"), save=wrong)
    assert (tmp_path / "precious.safetensors").read_text() == "x"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MintError, match="not a reference"):
        evaluate(str(tmp_path / "out"), source=str(file))


@pytest.mark.skipif(not on_cpu(), reason="a GPU runs quantized layers themselves")
def test_a_quantized_checkpoint_runs_as_its_source_with_dequantized_weights(
    make: Maker, tmp_path: Path
) -> None:
    folder = make(qwen3_moe(2))
    result = convert.convert(str(folder), "5bpw", tmp_path / "out", smoke=False)
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


def test_windows() -> None:
    ids = np.arange(1000)
    assert cut(ids, "windows", 32).tokens.shape == (31, 32)
    first, some = cut(ids, "windows", 32, 2), cut(ids, "windows", 32, 5, seed=1)
    assert first.tokens[1, 0] == 32 and first.scored == 2 * 31
    assert np.array_equal(some.tokens, cut(ids, "windows", 32, 5, seed=1).tokens)
    assert not np.array_equal(some.tokens, cut(ids, "windows", 32, 5, seed=2).tokens)
    half = cut(ids, "llama.cpp", 32, bos=7)
    assert (
        (half.tokens[:, 0] == 7).all()
        and half.positions == slice(16, 32)
        and half.scored == 31 * 15
    )
    with pytest.raises(MintError, match="less than one window"):
        cut(np.arange(10), "windows", 32)
    for wrong in (("chunks", 32, None), ("windows", 2, None), ("windows", 32, 0)):
        with pytest.raises(UsageError):
            cut(ids, *wrong)


def test_the_llama_cpp_protocol_scores_the_second_half(make: Maker) -> None:
    folder = make(llama(1))
    half = Windows(RANDOM.tokens, first=13)
    np.testing.assert_allclose(run(folder, half).nll, run(folder, RANDOM).nll[:, 12:], atol=1e-5)


def test_statistics_by_hand() -> None:
    nll = np.log(np.array([[49.0, 49.0], [196.0, 196.0], [98.0, 98.0]]))
    figures = stats.perplexity_figures([score.Score(nll, finished=3)])
    assert figures["perplexity"] == pytest.approx(98) and figures[
        "median_perplexity"
    ] == pytest.approx(98)
    assert figures["outliers"] == 1 and figures["tokens"] == 6
    assert figures["perplexity_se"] == pytest.approx(98 * np.log(2) / np.sqrt(3))
    for degrees, value in (
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (5, 2.571),
        (30, 2.042),
        (1000, 1.962),
    ):
        assert stats.student(degrees) == pytest.approx(value, rel=0.01)


def test_logits_of_a_model_in_16_bits_are_not_rounded_to_them(make: Maker) -> None:
    """As models run on a GPU. A bfloat16 of 20 is off by up to .06, more than the whole divergence
    of 8 bits.
    """
    loaded = runner.load_runner(make(llama(2)))
    loaded.model.set_dtype(mx.bfloat16)
    for piece in runner.forward(loaded, RANDOM.tokens, 2):
        rounded = piece.logits.astype(mx.bfloat16).astype(mx.float32)
        assert piece.logits.dtype == mx.float32 and mx.mean(rounded == piece.logits).item() < 0.1


def test_a_vocabulary_smaller_than_the_sources_is_refused(make: Maker) -> None:
    """Also where none of the missing tokens is among the likely ones that are kept."""
    folder = make(llama(1))
    part = predictions(folder, RANDOM)
    more = np.pad(part.whole_logp, ((0, 0), (0, 8)), constant_values=-50)
    with pytest.raises(MintError, match="vocabulary is smaller"):
        run(folder, RANDOM, part=replace(part, whole_logp=more))


def test_one_window_has_no_error_bar() -> None:
    figures = stats.perplexity_figures([score.Score(np.ones((1, 5)), finished=1)])
    assert figures["perplexity_se"] is None


def test_an_interruption_gives_the_figures_so_far(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = runner.load_runner(make(qwen3_moe(1)))
    part = reference.predict(loaded, RANDOM, 1, batch=1, routing=runner.Routing())
    calls = []
    hidden = runner.trunk_output

    def interrupt(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hidden(*args)

    monkeypatch.setattr(runner, "trunk_output", interrupt)
    found = score.score(loaded, RANDOM, 1, part)
    assert (
        found.finished == 2
        and found.nll.shape == (2, 23)
        and found.kl.shape == (2, 24)
        and len(found.routing[0]) == 2
    )
    assert stats.divergence_figures([found], [part])["kl"] == pytest.approx(0, abs=1e-6)


def test_damaged_weights_and_wrong_sources_are_noticed(make: Maker, tmp_path: Path) -> None:
    loaded = runner.load_runner(make(llama(1)))
    loaded.model.model.norm.weight = loaded.model.model.norm.weight * float("nan")
    with pytest.raises(MintError, match="not finite"):
        score.score(loaded, RANDOM, 1)
    other = make(llama(1), "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MintError, match="tokenizers"):
        evaluate(str(other), source=str(make(llama(1))))
    with pytest.raises(MintError, match="chat template"):
        evaluate(str(other), Settings(chat=True), source=str(other))


def test_another_model_is_refused_not_scored(make: Maker) -> None:
    part = predictions(make(qwen3_moe(2), "a"), RANDOM)
    for other in (make(llama(2), "b"), make(qwen3_moe(1), "c")):
        with pytest.raises(MintError, match="not the same model"):
            run(other, RANDOM, part=part)
    with pytest.raises(MintError, match="token 500"):
        run(make(llama(1), "d"), Windows(np.full((1, 8), 500, dtype=np.int32)))


def test_a_padded_vocabulary_is_compared(make: Maker) -> None:
    source = make(llama(1), "a")
    config, shapes = llama(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shapes[name] = (128, 128)
    padded = make((config | {"vocab_size": 128}, shapes), "b")
    weights, wide = (
        mx.load(str(source / "model.safetensors")),
        mx.load(str(padded / "model.safetensors")),
    )
    for name, w in weights.items():
        wide[name] = (
            mx.concatenate([w, mx.zeros((32, 128), w.dtype)]) if wide[name].shape != w.shape else w
        )
    mx.eval(wide)
    mx.save_safetensors(str(padded / "model.safetensors"), wide)
    found = run(padded, RANDOM, part=predictions(source, RANDOM))
    assert (
        np.isfinite(found.kl).all() and 0 < found.kl.mean() < 0.5
    )  # 32 tokens of logit 0 take their share


def test_a_reference_that_cannot_be_kept_costs_nothing(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.numpy

    def full(*args: Any, **more: Any) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    (tmp_path / "t.txt").write_text("a text of its own " * 20)
    source, settings, notes = (
        str(make(llama(1))),
        Settings(length=32, text=str(tmp_path / "t.txt")),
        Notes(),
    )
    assert evaluate(source, settings, source=source, report=notes)["kl"] >= 0
    assert any("could not be written" in said and "No space left" in said for said in notes.said)
    with pytest.raises(OSError, match="No space left"):
        evaluate(source, settings, source=source, save=tmp_path / "kept.safetensors")


@pytest.mark.parametrize("fp8", [False, True])  # which mlx-lm doesn't load by itself
def test_chat_scores_the_sources_own_replies(
    fp8: bool, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = released("qwen3_moe_fp8", tmp_path / "fp8") if fp8 else make(llama(1))
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr(chat, "PROMPTS", ("abc", "defg"))
    monkeypatch.setattr(chat, "REPLY", 5)
    figures = evaluate(str(source), Settings(chat=True), source=str(source))
    assert (
        2 <= figures["tokens"] <= 10
        and figures["kl"] < figures["noise_floor"]
        and figures["same_top1"] == 1
    )
    monkeypatch.setenv("MINT_MLX_CACHE", str(source.parent / "empty"))
    monkeypatch.setattr(chat, "fits", lambda folder: False)
    with pytest.raises(MintError, match="too large for"):
        evaluate(str(source), Settings(chat=True), source=str(source))
    for other in ({"length": 32}, {"windows": 2}, {"text": "t.txt"}, {"protocol": "llama.cpp"}):
        with pytest.raises(UsageError, match="--chat scores"):
            Settings(chat=True, **other)


def test_the_json_of_eval_has_what_is_promised(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mint_mlx.cli import main

    source = str(make(llama(1)))
    (tmp_path / "t.txt").write_text("sphinx of black quartz judge my vow " * 20)
    command = [
        "mint-mlx",
        "eval",
        source,
        "--source",
        source,
        "--text",
        str(tmp_path / "t.txt"),
        "--length",
        "32",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main.main()
    found = json.loads(capsys.readouterr().out)
    wanted = {
        "perplexity",
        "perplexity_se",
        "median_perplexity",
        "trimmed_perplexity",
        "tokens",
        "seconds",
    }
    wanted |= {
        "tokens_per_second",
        "bytes",
        "bits_per_weight",
        "kl",
        "kl_se",
        "kl_median",
        "kl_p99",
        "same_top1",
    }
    assert wanted | {"ln_ppl_difference", "ln_ppl_difference_ci95"} <= found.keys()


def test_the_speed_of_a_source_that_mlx_lm_does_not_load(tmp_path: Path) -> None:
    found = speed(released("qwen3_moe_fp8", tmp_path / "fp8"))
    assert found["prompt_tokens_per_second"] > 0 and found["decode_tokens_per_second"] > 0
