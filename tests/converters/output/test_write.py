"""A folder gets its name when all in it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, llama

from mint_mlx.converters.output import shard_writer, write
from mint_mlx.jobs.convert import convert


def test_an_end_that_was_cut_short_is_resumed(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    folder = str(make(llama(1)))
    with monkeypatch.context() as patch:
        patch.setattr(write, "verify", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()

    # Nothing is left to write.
    monkeypatch.setattr(shard_writer.Writer, "put", lambda *_: pytest.fail("it was written again"))
    convert(folder, "5bpw", tmp_path / "out", smoke=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()
