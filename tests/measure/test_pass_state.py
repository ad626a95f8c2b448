"""A pass through the blocks that was interrupted goes on to the same numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from helpers import HIDDEN, TOKENS, Cli, Maker, edit_weights, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.jobs.model import prepare
from mint_mlx.measure import pass_state
from mint_mlx.measure.fisher import measure
from mint_mlx.measure.sensitivity_file import save_sensitivity
from mint_mlx.measure.text import Text
from mint_mlx.runtime import blocks

INTERRUPTIONS = [
    (calls, streamed, KeyboardInterrupt) for calls in (1, 3, 4, 5) for streamed in (False, True)
]
FAILURES = [(3, True, error) for error in (OSError, MemoryError, RuntimeError)]


@pytest.mark.parametrize(("calls", "streamed", "error"), [*INTERRUPTIONS, *FAILURES])
def test_a_walk_that_was_interrupted_goes_on_to_the_same_numbers(
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
    streamed: bool,
    error: type[BaseException],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    job = prepare(str(make(qwen3_moe(3))))

    def walk(name: str, stop: int | None = None) -> bytes:
        """A sensitivity as a file holds it; raises `error` after so many calls of progress."""
        seen: list[str] = []

        def progress(what: str, *_: int) -> None:
            if len(seen) == stop:
                raise error
            seen.append(what)

        more = {"progress": progress, "streamed": streamed, "key": "k"}
        sensitivity = measure(job.source, job.inventory, Text(TOKENS, "r"), **more)
        save_sensitivity(sensitivity, tmp_path / name)
        return (tmp_path / name).read_bytes()

    whole = walk("whole.npz")
    assert not list(work.iterdir())

    # What an interrupted pass leaves on the disk is for its user's eyes only.
    with pytest.raises(error):
        walk("interrupted.npz", stop=calls)
    (spills,) = work.iterdir()
    assert (spills.stat().st_mode & 0o77) == 0

    # Only the blocks after it are run again.
    run_again = []
    run = blocks.run

    def recorded(step: blocks.Step, *more: Any) -> Any:
        run_again.append(step.index)
        return run(step, *more)

    monkeypatch.setattr(blocks, "run", recorded)
    assert walk("again.npz") == whole
    assert run_again == list(range(calls, 3))
    assert not list(work.iterdir())


@pytest.mark.usefixtures("like_a_gpu")
def test_what_is_kept_of_a_walk_has_the_type_that_it_had(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms in float32 make all that comes after the first one float32, in a model of bfloat16."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = make(llama(3))
    tensors = mx.load(str(folder / "model.safetensors"))
    mixed = {name: a.astype(mx.float32) if "norm" in name else a for name, a in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), mixed, metadata={"format": "pt"})
    job = prepare(str(folder))

    def stop(what: str, done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    whole = measure(job.source, job.inventory, Text(TOKENS, "r"))
    with pytest.raises(KeyboardInterrupt):
        measure(job.source, job.inventory, Text(TOKENS, "r"), progress=stop, key="k")
    again = measure(job.source, job.inventory, Text(TOKENS, "r"), key="k")
    assert all((whole.trace[path] == again.trace[path]).all() for path in whole.trace)


def test_what_blocks_read_must_fit_on_the_disk(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(make(qwen3_moe(2))))
    free = TOKENS.size * HIDDEN * 4 * 3 - 1
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(MintError, match="--work-dir"):
        measure(job.source, job.inventory, Text(TOKENS, "random"), batch=2)


def test_spills_go_where_they_are_told_to(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, make: Maker
) -> None:
    folder = make(llama(1))
    spills = folder.parent / "spills"
    command = ("sensitivity", folder, "-o", folder.parent / "s.npz", "--work-dir", spills)
    refused = cli(*command)
    assert refused.code == 2
    assert "make it first" in refused.err

    spills.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    seen: list[Path] = []
    keep = pass_state.write_hidden

    def watched(folder: Path, *more: Any) -> None:
        seen.append(folder.parent)
        keep(folder, *more)

    monkeypatch.setattr(pass_state, "write_hidden", watched)
    assert cli(*command).code == 0
    assert set(seen) == {spills}
    assert not list(spills.iterdir())


def test_what_overflows_is_refused_where_it_does(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = make(llama(3))
    large = "model.layers.1.input_layernorm.weight"
    edit_weights(folder, lambda w: w | {large: mx.full(w[large].shape, 3e38, dtype=mx.bfloat16)})
    job = prepare(str(folder))
    for _ in range(2):
        with pytest.raises(MintError, match=r"not finite .at block 1, among others"):
            measure(job.source, job.inventory, Text(TOKENS, "r"), key="k")
    assert not list(tmp_path.glob(f"{pass_state.NAME}*"))


def test_a_state_that_vanishes_is_told(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    job = prepare(str(make(llama(2))))

    def vanish(what: str, *_: int) -> None:
        if what == "block 1 back":
            next(tmp_path.rglob("hidden-1.safetensors")).unlink()

    with pytest.raises(MintError, match=r"what block 1 reads has vanished from .* run the same"):
        measure(job.source, job.inventory, Text(TOKENS, "r"), progress=vanish, key="k")
