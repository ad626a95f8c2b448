"""Exceptions that users meet are one sentence, whoever raises them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mint_mlx.base.array_files import write_arrays
from mint_mlx.base.errors import explain, is_passing


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
    compiled = RuntimeError("[Compile::eval_cpu] Failed to compile function C: ld: No space left")
    for error in (OSError(28, "x"), by_numpy, by_safetensors.value, by_mlx, compiled):
        assert is_passing(error)
        assert str(explain(error)).startswith("the disk is full")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "too little memory"),
        (OSError(12, "Cannot allocate memory"), "too little memory"),
        (ImportError("x.so: failed to map segment from shared object"), "too little memory"),
        (RuntimeError("can't start new thread"), "too little memory"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(27, "File too large", "x"), r"\(x\).*ulimit -f"),
        (RuntimeError("[Compile::eval_cpu] Failed to compile function C with"), "needs g\\+\\+"),
        (ValueError("not allowed to raise maximum limit"), "ulimit -n"),
        (RuntimeError("Could not determine home directory."), "set HOME"),
        (IsADirectoryError(21, "Is a directory", "x"), r"is a directory \(x\)"),
        (FileNotFoundError(2, "No such file or directory", "x"), r"no such file .* \(x\)"),
    ],
)
def test_what_a_shell_or_a_disk_does_is_one_sentence(error: Exception, words: str) -> None:
    assert re.search(words, str(explain(error)))


def test_what_a_model_does_wrong_does_not_pass() -> None:
    for error in (ValueError("shapes"), RuntimeError("[Compile::eval_cpu] Failed: g++: not found")):
        assert not is_passing(error)
    assert is_passing(MemoryError())


def test_a_name_that_is_not_utf8_is_one_sentence() -> None:
    with pytest.raises(UnicodeEncodeError) as raised:
        "\udcff".encode()
    assert "not valid UTF-8" in str(explain(raised.value))
    assert explain(ValueError("shapes differ")) is None


def test_a_transfer_that_breaks_off_is_one_sentence() -> None:
    class TransportError(Exception): ...

    class WriteTimeout(TransportError): ...

    for error in (
        WriteTimeout("slow"),
        RuntimeError("Task error: CAS Client Error: Reqwest Error"),
    ):
        assert "Hugging Face Hub" in str(explain(error))
    assert explain(RuntimeError("shapes differ")) is None
