"""Draws follow the predictions, and their loss has the gradient of a cross-entropy."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mint_mlx.runtime.draws import RUN, draw, drawn_loss, uniform_numbers

VOCABULARY = 2 * RUN + 7


def test_tokens_are_drawn_as_often_as_they_are_predicted() -> None:
    logits = 2 * mx.random.normal((VOCABULARY,), key=mx.random.key(0))
    shares = np.array(mx.softmax(logits))
    count = 20_000
    labels = draw(
        mx.broadcast_to(logits, (count, VOCABULARY)), uniform_numbers("labels", 1, (count,))
    )
    drawn = np.bincount(labels, minlength=VOCABULARY) / count
    assert np.abs(drawn - shares).max() < 5 * np.sqrt(shares.max() / count)


def test_the_number_decides_which_token_is_drawn() -> None:
    logits = mx.broadcast_to(mx.log(mx.array([0.5, 0.0, 0.25, 0.25])), (2, 3, 4))
    uniform = np.array([[0.01, 0.49, 0.51], [0.74, 0.76, 1.0]])
    assert draw(logits, uniform).tolist() == [[0, 0, 2], [2, 3, 3]]


@pytest.mark.parametrize("size", [3, VOCABULARY])
def test_the_losss_gradient_is_that_of_the_tokens_drawn(size: int) -> None:
    logits = 3 * mx.random.normal((4, 5, size), key=mx.random.key(2)) + 100
    uniform = uniform_numbers("labels", 3, (4, 5))
    labels = mx.array(draw(logits, uniform))

    def expected(logits: mx.array) -> mx.array:
        return nn.losses.cross_entropy(logits, labels, reduction="sum")

    loss, gradient = mx.value_and_grad(lambda x: drawn_loss(x, uniform))(logits)
    exact, exact_gradient = mx.value_and_grad(expected)(logits)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(exact_gradient), atol=1e-5)


def test_text_and_labels_are_drawn_by_independent_numbers() -> None:
    one, other = uniform_numbers("text", 0, (1000,)), uniform_numbers("labels", 0, (1000,))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
