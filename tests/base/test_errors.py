"""Exceptions that users meet are one sentence, whoever raises them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mint_mlx.base.array_files import write_arrays
from mint_mlx.base.errors import explain


def test_a_disk_that_is_full_says_so_whoever_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*args: Any, **more: Any) -> None:
        raise SafetensorError("I/O (os error 28)")

    by_mlx = RuntimeError("[write] Unable to write 4096 bytes to file.")
    by_numpy = OSError("524288 requested and 261088 written")
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left") as by_safetensors:
        write_arrays(tmp_path / "x.safetensors", {})
    for error in (OSError(28, "x"), by_numpy, by_safetensors.value, by_mlx):
        assert str(explain(error)).startswith("the disk is full")


def test_a_transfer_that_breaks_off_is_one_sentence() -> None:
    class TransportError(Exception): ...

    class WriteTimeout(TransportError): ...

    for error in (
        WriteTimeout("slow"),
        RuntimeError("Task error: CAS Client Error: Reqwest Error"),
    ):
        assert "Hugging Face Hub" in str(explain(error))
    assert explain(RuntimeError("shapes differ")) is None
