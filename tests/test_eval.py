"""Perplexity, held against a forward pass written out by hand."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import Maker, llama, qwen3_moe

from mint_mlx import mlxlm, pipeline, runner
from mint_mlx.errors import MintError
from mint_mlx.eval import score, text


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
    """Log-probabilities (tokens, vocabulary) of conftest's llama or qwen3_moe for one window, in float64."""

    def norm(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w

    def rope(x: np.ndarray) -> np.ndarray:  # (heads, tokens, 32)
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)

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
            (x @ weights[f"{p}.self_attn.{c}_proj.weight"].T).reshape(n, -1, 32).transpose(1, 0, 2) for c in "qkv"
        )
        if f"{p}.self_attn.q_norm.weight" in weights:
            q, k = norm(q, weights[f"{p}.self_attn.q_norm.weight"]), norm(k, weights[f"{p}.self_attn.k_norm.weight"])
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
                    out[t] += share[t, e] / share[t, best].sum() * swiglu(x[t], f"{p}.mlp.experts.{e}")
            h = h + out
        else:
            h = h + swiglu(x, f"{p}.mlp")
    logits = norm(h, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    return np.log(softmax(logits))


@pytest.mark.parametrize("model", [llama(2), qwen3_moe(2)], ids=["llama", "qwen3_moe"])
def test_scores_equal_a_forward_pass_by_hand(make: Maker, model: tuple[dict, dict]) -> None:
    folder = make(model)
    weights = {
        k: np.array(v.astype(mx.float32), dtype=np.float64)
        for k, v in mx.load(str(folder / "model.safetensors")).items()
    }
    windows = np.random.default_rng(0).integers(0, 96, (3, 24))
    loaded, _ = score.load_for_scoring(folder)
    found = score.score(loaded, windows, batch=2)
    for window, nll in zip(windows, found.nll, strict=True):
        logp = numpy_llama(weights, window, 2)
        np.testing.assert_allclose(nll, -logp[np.arange(23), window[1:]], rtol=1e-3, atol=1e-4)
    assert found.tokens == 3 * 23


def test_a_quantized_checkpoint_scores_as_its_dequantized_weights(make: Maker, tmp_path: Path) -> None:
    folder = make(qwen3_moe(2))
    pipeline.convert(str(folder), "5bpw", tmp_path / "out", smoke=False)
    stock = mlxlm.build_model(tmp_path / "out")
    stock.set_dtype(mx.float32)
    tokens = mx.array(np.random.default_rng(0).integers(0, 96, (1, 24)))
    dense, _ = score.load_for_scoring(tmp_path / "out")
    np.testing.assert_allclose(np.array(dense(tokens)), np.array(stock(tokens)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_experts_equal_mlx_lm(is_sorted: bool, bias: bool) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    stock = SwitchLinear(16, 8, 4, bias=bias)
    grouped = runner.GroupedSwitchLinear(16, 8, 4, bias=bias)
    grouped.update(stock.parameters())
    indices = np.random.default_rng(0).integers(0, 3, (10,) if is_sorted else (5, 2))  # expert 3 gets no token
    indices = np.sort(indices) if is_sorted else indices
    x = mx.random.normal((10, 1, 16) if is_sorted else (5, 1, 1, 16), key=mx.random.key(0))
    expected = stock(x, mx.array(indices), sorted_indices=is_sorted)
    np.testing.assert_allclose(
        np.array(grouped(x, mx.array(indices), sorted_indices=is_sorted)), np.array(expected), atol=1e-5
    )


def test_windows(demo_model: Path) -> None:
    assert score.make_windows(np.arange(100), 32).shape == (3, 32)
    assert score.make_windows(np.arange(100), 32, 2).shape == (2, 32)
    with pytest.raises(MintError, match="less than one window"):
        score.make_windows(np.arange(10), 32)


def test_damaged_weights_are_noticed(make: Maker) -> None:
    loaded, _ = score.load_for_scoring(make(llama(1)))
    loaded.model.norm.weight = loaded.model.norm.weight * float("nan")
    with pytest.raises(MintError, match="not finite"):
        score.score(loaded, np.zeros((1, 8), dtype=np.int64), 1)
