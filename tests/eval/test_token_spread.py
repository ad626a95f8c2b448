"""The spread of a divergence over tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import Maker, qwen3_moe
from scoring import RANDOM, predictions_of, score_of

from mint_mlx.eval.token_spread import WORST, token_spread
from mint_mlx.jobs import convert


class Letters:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, ids: Any) -> str:
        return "".join(f"<{i}>" for i in ids)


def test_the_worst_tokens_are_those_of_largest_divergence(make: Maker, tmp_path: Any) -> None:
    source = make(qwen3_moe(1))
    out = tmp_path / "out"
    convert.convert(str(source), None, out, uniform="3bit-g64", smoke=False)
    predictions = predictions_of(source, RANDOM)
    score = score_of(out, RANDOM, predictions)
    spread = token_spread([score], [predictions], Letters())
    assert score.kl is not None

    # After a window's last position no token came.
    kl = score.kl[:, :-1]
    row, column = np.unravel_index(int(kl.argmax()), kl.shape)
    worst = spread["worst"][0]
    assert worst["kl"] == kl.max() and len(spread["worst"]) == WORST
    tokens = RANDOM.tokens[row]
    assert worst["token"] == f"<{tokens[column + 1]}>"
    assert worst["before"].endswith(f"<{tokens[column]}>")
    assert worst["model"] == pytest.approx(np.exp(-score.nll[row, column]))
    index = row * RANDOM.per_window + column
    assert worst["favourite"] == f"<{predictions.best[index]}>"
    assert worst["source"] == pytest.approx(float(np.exp(predictions.true[index])))

    # Shares are of all positions, and so is the half.
    flat = np.sort(np.maximum(score.kl, 0).reshape(-1))[::-1]
    half = round(spread["half"] * len(flat))
    assert flat[:half].sum() >= flat.sum() / 2 > flat[: half - 1].sum()
    assert sum(spread["tokens"]) == pytest.approx(1) == sum(spread["kl"])

    # Of an interrupted run the finished windows count.
    short = replace(score, kl=score.kl[:1], nll=score.nll[:1])
    assert token_spread([short], [predictions], Letters())["worst"][0]["kl"] == kl[0].max()
