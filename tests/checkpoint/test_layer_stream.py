"""One layer at a time is in memory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
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
