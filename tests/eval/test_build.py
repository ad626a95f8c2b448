"""Checkpoints of a comparison in the cache: what is there is taken, what was cut short goes on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Maker, llama
from scoring import by_method

from mint_mlx.base.checksum import DamagedFile
from mint_mlx.base.errors import MintError
from mint_mlx.converters.output import write
from mint_mlx.converters.output.shard_writer import Writer
from mint_mlx.eval import compare as comparing
from mint_mlx.eval.compare import compare
from mint_mlx.eval.settings import Settings
from mint_mlx.measure import cache


def test_a_second_run_does_only_what_is_new(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(2)))
    methods = ["nmse", "uniform-g64"]
    first = compare(folder, ["5bpw"], methods, settings=settings, speed=False)

    scored: list[str] = []
    score = comparing.score_model
    monkeypatch.setattr(
        comparing, "score_model", lambda source, *a: scored.append(source.name) or score(source, *a)
    )
    methods.append("mixed_4_6")
    second = compare(folder, ["5bpw"], methods, settings=settings, speed=False)
    assert sorted(scored) == ["mixed_4_6", "nmse"]  # the new peer, and ours at its size
    kl = by_method(first.rows)["uniform-g64"]["kl"]
    assert by_method(second.rows)["uniform-g64"]["kl"] == kl

    # All of it is known as ours, and can be dropped.
    assert cache.strangers() == []
    assert {entry.kind for entry in cache.entries()} >= {"profiles", "references", "compare"}
    cache.clear()
    folders = (cache.cache_dir() / kind for kind in cache.KINDS)
    assert not [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def test_what_was_interrupted_goes_on(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(2)))
    written: list[str] = []
    put = Writer.put

    def counted(self: Writer, unit: str, tensors: Any) -> None:
        written.append(unit)
        if len(written) == 5:
            raise KeyboardInterrupt
        put(self, unit, tensors)

    monkeypatch.setattr(Writer, "put", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(folder, ["5bpw"], ["balanced"], settings=settings, speed=False)
    compare(folder, ["5bpw"], ["balanced"], settings=settings, speed=False)

    # Each once, and the one that was cut short once more.
    assert sorted(written) == sorted([*set(written), written[4]])


def flip(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda checkpoint: (checkpoint / "model.safetensors").unlink(),
        lambda checkpoint: (checkpoint / "config.json").unlink(),
        lambda checkpoint: (checkpoint.parent / "made.json").unlink(),
        lambda checkpoint: (checkpoint.parent / "made.json").write_text("{"),
    ],
    ids=["flipped", "no weights", "no config", "no note", "damaged note"],
)
def test_a_damaged_checkpoint_is_built_anew(
    damage: Callable[[Path], Any],
    make: Maker,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = str(make(llama(1)))
    first = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    (checkpoint,) = cache.cache_dir().rglob("checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", lambda *_: pytest.fail("it was written anew"))
        (checkpoint / ".DS_Store").write_text("")  # as a file manager leaves it
        compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)

    damage(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedFile)
        second = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    assert {k: second.rows[0][k] for k in ("kl", "bytes")} == {
        k: first.rows[0][k] for k in ("kl", "bytes")
    }
    assert (checkpoint / "model.safetensors").is_file()


def test_one_that_was_finished_and_not_yet_named_is_taken(make: Maker, settings: Settings) -> None:
    """The run ended between the two."""
    folder = str(make(llama(1)))
    first = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    (checkpoint,) = cache.cache_dir().rglob("checkpoint")
    checkpoint.rename(checkpoint.with_name("unfinished"))
    second = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    assert second.rows[0]["kl"] == first.rows[0]["kl"]


def test_a_full_disk_is_no_lasting_reason(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))

    def full(*_: Any) -> None:
        raise MintError("the disk has 1 B free")

    with monkeypatch.context() as patch:
        patch.setattr(write, "check_space", full)
        first = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    assert by_method(first.rows)["nmse"]["reason"] == "the disk has 1 B free"
    second = compare(folder, ["5bpw"], ["nmse"], settings=settings, speed=False)
    assert by_method(second.rows)["nmse"]["kl"] > 0


def test_what_is_made_of_a_source_that_changes_is_not_kept(
    make: Maker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(llama(1))
    put = Writer.put

    def touched(self: Writer, unit: str, tensors: Any) -> None:
        os.utime(folder / "tokenizer.json", ns=(1, 1))
        put(self, unit, tensors)

    monkeypatch.setattr(Writer, "put", touched)
    with pytest.raises(MintError, match="have changed while they were read"):
        compare(str(folder), ["5bpw"], ["nmse"], settings=settings, speed=False)
    assert not list(cache.cache_dir().rglob("checkpoint"))
    assert not list(cache.cache_dir().rglob("made.json"))
