"""The table of targets: ratios of KLs over the same windows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mint_mlx.eval import targets_table


def test_a_ratio_of_windows_in_proportion_has_no_error() -> None:
    theirs = np.array([0.5, 1.0, 2.0, 0.1])
    assert targets_table.ratio(0.3 * theirs, theirs) == pytest.approx((0.3, 0.0))


def test_a_ratio_has_the_error_of_a_ratio_estimator() -> None:
    """Residuals of -1 and 1 around 2 times (1, 1): a standard error of 1, with one degree."""
    assert targets_table.ratio(np.array([1.0, 3.0]), np.ones(2)) == pytest.approx((2.0, 12.706))


def test_what_is_above_its_limit_is_bold_and_what_was_not_measured_is_said() -> None:
    theirs = np.array([1.0, 2.0])
    assert targets_table.cell(0.31 * theirs, theirs, 0.3) == "**.31 (.31 to .31)**"
    assert targets_table.cell(0.29 * theirs, theirs, 0.3) == ".29 (.29 to .29)"
    assert targets_table.cell(None, theirs, 0.3) == "-"


def test_two_texts_give_the_mean_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense model with tables of its own, whose `best` was also made from a second text."""

    def row(method: str, kind: str, kl: float, size: int = 1000) -> dict[str, object]:
        figures = {"kl": kl, "window_kl": [kl, kl], "bytes": size, "group": size}
        return {
            "method": method,
            "kind": kind,
            "sees_text": False,
            "bits_per_weight": 4.5,
        } | figures

    def write(folder: str, rows: list[dict[str, object]]) -> None:
        (tmp_path / folder).mkdir(parents=True)
        text = json.dumps({"source": "some", "rows": rows})
        (tmp_path / folder / "results.json").write_text(text)

    peers = [row("mint", "peer", 2.0), row("uniform-g64", "peer", 1.0)]
    write("dense/some", [row("best", "ours", 0.1), *peers])
    write("second-text/some", [row("best-seed-1", "given", 0.3), row("best-x", "given", 9.0, 2000)])
    monkeypatch.setattr(targets_table, "RESULTS", tmp_path)

    (size,) = targets_table.dense_sizes()
    assert size.ours["best"] == pytest.approx([0.2, 0.2])
    assert ".20 (.20 to .20)" in targets_table.line(size)
