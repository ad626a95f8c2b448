"""GGUF files are refused by the name of the model that they were made from."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub

from mint_mlx.base.errors import MintError
from mint_mlx.converters.sources.gguf import original_repo
from mint_mlx.jobs import convert


def write_gguf(path: Path, **pairs: str) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    scores = text("general.tags") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    sizes = text("general.sizes") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3)
    count = text("llama.block_count") + struct.pack("<II", 4, 2)
    strings = [text(key) + struct.pack("<I", 8) + text(value) for key, value in pairs.items()]
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 3 + len(pairs))
    path.write_bytes(head + scores + sizes + count + b"".join(strings))
    return path


@pytest.mark.parametrize(
    ("key", "value", "repo"),
    [
        ("general.source.huggingface.repository", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
        (
            "general.base_model.0.repo_url",
            "https://huggingface.co/Qwen/Qwen3-30B-A3B",
            "Qwen/Qwen3-30B-A3B",
        ),
        ("general.source.url", "https://example.com/elsewhere", None),
        ("general.name", "Qwen3", None),
    ],
)
def test_a_gguf_file_is_refused_with_its_original(
    tmp_path: Path, key: str, value: str, repo: str | None
) -> None:
    path = write_gguf(tmp_path / "model.GGUF", **{key: value})
    assert original_repo(path) == repo
    for given in (path, tmp_path):
        with pytest.raises(MintError, match=repo or "the original Hugging Face checkpoint"):
            convert.convert(str(given), "5bpw")


@pytest.mark.parametrize("size", [0, 3, 12, 23, 60, 100])
def test_a_damaged_gguf_file_names_nothing(tmp_path: Path, size: int) -> None:
    path = write_gguf(
        tmp_path / "model.gguf", **{"general.source.url": "https://huggingface.co/a/b"}
    )
    path.write_bytes(path.read_bytes()[:size])
    assert original_repo(path) is None


def test_arrays_in_arrays_without_end_name_nothing(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"x" + struct.pack("<I", 9)
    (tmp_path / "model.gguf").write_bytes(head + struct.pack("<IQ", 9, 1) * 5000)
    assert original_repo(tmp_path / "model.gguf") is None


@pytest.mark.parametrize(
    ("card", "instead"),
    [({"base_model": ["org/original"]}, "give org/original"), ({}, "give the original checkpoint")],
)
def test_a_repository_of_gguf_files_names_the_original(
    hub: FakeHub, card: dict[str, Any], instead: str
) -> None:
    for shard in hub.folder.glob("*.safetensors*"):
        shard.unlink()
    (hub.folder / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF")
    hub.card = card
    done = hub.run("convert", "org/tiny", "--budget", "5bpw")
    assert done.returncode == 1, done.stderr
    assert "GGUF files only" in done.stderr, done.stderr
    assert instead in done.stderr, done.stderr
