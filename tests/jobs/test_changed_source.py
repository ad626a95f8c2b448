"""A source that changes while it is read: nothing is made of it, nor taken up of it later."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, Notes, llama

from mint_mlx.base.errors import MintError
from mint_mlx.converters.output.shard_writer import Writer
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.measurements import get_profile, get_sensitivity
from mint_mlx.jobs.model import prepare
from mint_mlx.measure import cache, profile, rounds

CHANGED = "have changed while they were read"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_unfinished_work_on_it_is_not_taken_up(
    name: str, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    put = Writer.put

    def touched(self: Writer, unit: str, tensors: Any) -> None:
        os.utime(folder / name, ns=(1, 1))
        put(self, unit, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", touched)
        with pytest.raises(MintError, match=CHANGED):
            convert(str(folder), uniform="4bit-g32", out=tmp_path / "out", smoke=False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
    convert(str(folder), uniform="4bit-g32", out=tmp_path / "out", smoke=False)


def test_what_was_noted_of_it_is_forgotten(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    job = prepare(str(folder))
    monkeypatch.setattr("mint_mlx.rules.efforts.TOKENS", 512)
    measure, noted = rounds.measure, profile.append_curve

    def touch() -> None:
        now = time.monotonic_ns()
        os.utime(folder / "model.safetensors", ns=(now, now))

    def measured(*args: Any, **options: Any) -> Any:
        touch()
        return measure(*args, **options)

    monkeypatch.setattr(profile, "append_curve", lambda *a: (touch(), noted(*a)))
    monkeypatch.setattr(rounds, "measure", measured)
    with pytest.raises(MintError, match=CHANGED):
        get_profile(job, Notes())
    job = prepare(str(folder))
    with pytest.raises(MintError, match=CHANGED):
        get_sensitivity(job, Notes())
    assert [path.name for path in cache.cache_dir().rglob("*.begun-*")] == []
