"""Figures and their errors, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Maker, qwen3_moe
from scoring import RANDOM, predictions_of, score_of

from mint_mlx.eval import stats
from mint_mlx.eval.score import Score


def test_statistics_by_hand() -> None:
    nll = np.log(np.array([[49.0, 49.0], [196.0, 196.0], [98.0, 98.0]]))
    figures = stats.perplexity_figures([Score(nll, finished=3)])
    assert figures["perplexity"] == pytest.approx(98)
    assert figures["median_perplexity"] == pytest.approx(98)
    assert figures["outliers"] == 1
    assert figures["tokens"] == 6
    assert figures["perplexity_se"] == pytest.approx(98 * np.log(2) / np.sqrt(3))


@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042), (1000, 1.962)],
)
def test_quantiles_of_student(degrees: int, value: float) -> None:
    assert stats.student(degrees) == pytest.approx(value, rel=0.01)


def test_one_window_has_no_error_bar() -> None:
    figures = stats.perplexity_figures([Score(np.ones((1, 5)), finished=1)])
    assert figures["perplexity_se"] is None


def test_differences_are_paired_by_window() -> None:
    """Two checkpoints agree in hard windows and in easy ones: their own spread doesn't count."""
    theirs = [1.0, 2.0, 3.0, 4.0]
    difference, interval = stats.paired([0.9, 1.8, 2.9, 3.8], theirs)
    half = 3.182 * np.std([0.1, 0.2, 0.1, 0.2], ddof=1) / 2  # Student's t of three degrees, 97.5 %
    assert difference == pytest.approx(-0.15)
    assert interval == pytest.approx([-0.15 - half, -0.15 + half])
    assert stats.paired([1.0], [2.0]) == (-1.0, None)


def test_changed_experts_are_counted(make: Maker) -> None:
    source = make(qwen3_moe(2))
    predictions = predictions_of(source, RANDOM)
    score = score_of(source, RANDOM, predictions)
    score.routing[0][0, :6] = 3 - score.routing[0][0, :6][:, ::-1]
    changed = (np.stack(score.routing) != np.stack(predictions.routing)).any(-1).mean()
    figures = stats.divergence_figures([score], [predictions])
    assert changed > 0
    assert figures["router_changes"] == pytest.approx(changed)
