"""Rows of tokens that training never met don't count in a table's errors."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.measure.row_sampling import Read, measure_sample
from mint_mlx.measure.sample import AUTO, EXACT
from mint_mlx.measure.trained_rows import common_vector, of_trained_rows

CONFIGS = (QuantConfig(4, 32), QuantConfig(6, 32))


def _table(rows: int, untrained: float) -> tuple[np.ndarray, np.ndarray]:
    """A table (rows, 64), some rows of which are one vector with an outlier, and which they are."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((rows, 64), dtype=np.float32)
    is_untrained = rng.random(rows) < untrained
    vector = rng.standard_normal(64, dtype=np.float32)
    vector[3] = 60
    noise = 0.01 * rng.standard_normal((rows, 64), dtype=np.float32)
    return np.where(is_untrained[:, None], vector + noise, table), is_untrained


def _reader(table: np.ndarray) -> Read:
    return lambda experts, rows: mx.array(table[rows])


@pytest.mark.parametrize("sample", [EXACT, AUTO])
@pytest.mark.parametrize("untrained", [0.3, 0.8])
def test_a_tables_errors_are_those_of_trained_rows(sample: str, untrained: float) -> None:
    rows = 2048 if sample == EXACT else 40_000
    table, is_untrained = _table(rows, untrained)
    shape = (1, rows, 64)
    trained = table[~is_untrained]
    rng = np.random.default_rng(1)
    of_trained = measure_sample(_reader(trained), (1, len(trained), 64), CONFIGS, EXACT, rng, None)
    of_all = measure_sample(_reader(table), shape, CONFIGS, sample, rng, None)
    measured = measure_sample(of_trained_rows(_reader(table)), shape, CONFIGS, sample, rng, None)

    # Relative errors are the trained rows', and so is the size of a row.
    assert measured.nmse == pytest.approx(of_trained.nmse, rel=0.1)
    assert measured.energy / rows == pytest.approx(of_trained.energy / len(trained), rel=0.1)
    assert np.abs(of_all.nmse / of_trained.nmse - 1).max() > 0.2
    assert (of_all.energy / rows > 2 * of_trained.energy / len(trained)).all()


def test_a_row_is_replaced_by_the_same_one_each_time() -> None:
    table, is_untrained = _table(400, 0.5)
    read = of_trained_rows(_reader(table))
    rows = np.arange(400)[None]
    first = np.array(read(np.arange(1), rows))
    again = np.array(read(np.arange(1), rows[:, 100:300]))
    assert np.array_equal(first[:, 100:300], again)
    assert np.array_equal(first[0][~is_untrained], table[~is_untrained])


@pytest.mark.parametrize("case", ["random", "zeros", "nan", "few alike"])
def test_other_tables_have_no_common_vector(case: str) -> None:
    table = np.random.default_rng(2).standard_normal((300, 64), dtype=np.float32)
    if case == "zeros":
        table[:] = 0
    if case == "nan":
        table[5] = np.nan
    if case == "few alike":
        table[:10] = table[0]
    assert common_vector(table) is None
