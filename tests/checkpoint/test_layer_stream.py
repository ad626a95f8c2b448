"""One layer at a time is in memory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, llama

from mint_mlx.jobs.convert import convert


def test_memory_does_not_grow_with_depth(make: Maker, tmp_path: Path) -> None:
    peaks = []
    for layers in (4, 16):
        folder = make(llama(layers), f"deep{layers}")
        mx.clear_cache()
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        convert(str(folder), "4.5bpw", tmp_path / f"out{layers}", smoke=False)
        peaks.append(mx.get_peak_memory() - base)
    assert peaks[1] <= 1.1 * peaks[0] + 50_000


@pytest.mark.parametrize("sample", ["1", "0.5"])  # layers whole, and row by row
def test_what_a_layer_took_is_released(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: str
) -> None:
    released: list[int] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: released.append(1))
    model = str(make(llama(2)))
    result = convert(model, "5bpw", tmp_path / "out", sample=sample, smoke=False)
    assert len(released) >= 2 * len(result.inventory.layers)  # profiled and written
