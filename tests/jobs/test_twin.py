"""A model that doesn't fit in memory has its text written by a quantized twin, which does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SHORT
from helpers import Cli, Maker, Notes, edit_config, llama, order_for, qwen3_moe, write_checkpoint

from mint_mlx.base.distributed import Ranks
from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.source import load_source
from mint_mlx.jobs import dry_run, measurements, request, twin
from mint_mlx.jobs import refine as refining
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.measurements import first_token, get_profile, get_sensitivity, vocabulary
from mint_mlx.jobs.model import prepare
from mint_mlx.jobs.request import Request
from mint_mlx.jobs.stages import expected_stages
from mint_mlx.jobs.twin import Twin, Wish, find_twin, given_twin, wish_of
from mint_mlx.measure import cache
from mint_mlx.measure.self_text import random_windows, write_tokens
from mint_mlx.measure.sensitivity_file import load_sensitivity
from mint_mlx.rules import efforts
from mint_mlx.runtime import memory
from mint_mlx.runtime.memory import RESERVE

ROOM = 450_000  # bytes: less than the model takes in 32 bits, more than its twin does
TOKENS = 128  # of the text
# As a GPU, which multiplies quantized weights, with so little memory.
SMALL = f"""
from mint_mlx.jobs import twin
from mint_mlx.runtime import memory
memory.machine_limit = lambda: ({RESERVE + ROOM}, True)
twin.on_cpu = lambda: False
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efforts, "TOKENS", TOKENS)


@pytest.fixture
def model(make: Maker) -> Path:
    """A model of 0.15 M weights."""
    return make(llama(1))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with less memory than the model takes."""
    monkeypatch.setattr(memory, "machine_limit", lambda: (RESERVE + ROOM, True))
    monkeypatch.setattr(twin, "on_cpu", lambda: False)


def text_of(folder: Path, model: Path) -> np.ndarray:
    """What a checkpoint samples by itself, from the same first tokens."""
    job = prepare(str(model))
    windows = random_windows(vocabulary(job), TOKENS, first_token(job))
    return write_tokens(load_source(str(folder)), windows, packed=True)[0]


def written_twin(model: Path, out: Path) -> Path:
    """A checkpoint of 4 bits."""
    return convert(str(model), "5bpw", out, effort="fast", smoke=False).path


@pytest.mark.usefixtures("small")
def test_a_model_that_does_not_fit_has_its_text_written_by_a_twin(
    model: Path, tmp_path: Path, temporary: Path
) -> None:
    notes = Notes()
    asked: dict[str, Any] = {"budget": "5bpw", "out": tmp_path / "out", "effort": "balanced"}
    before = dry_run.dry_run(order_for(Request(str(model), **asked)))[1]
    assert before.twin is not None and before.spilled > 100_000
    convert(str(model), **asked, smoke=False, report=notes)
    written = load_sensitivity(tmp_path / "out" / "mint-sensitivity.npz")
    assert "by a twin of" in written.text.how
    assert list(temporary.glob("mint-mlx-*")) == []
    assert notes.begun == notes.expected
    assert any(note.startswith("twin ") and note.endswith("writes the text") for note in notes.said)

    # The same twin, left in a folder, samples the same; what was measured is in the cache.
    job = prepare(str(model))
    again = get_sensitivity(job, notes, TOKENS, wish_of(job, keep=tmp_path / "twin"))
    assert again is not None and again.text.how == written.text.how
    np.testing.assert_array_equal(text_of(tmp_path / "twin", model), written.tokens)
    np.testing.assert_array_equal(again.tokens, written.tokens)
    assert (tmp_path / "twin" / "model.safetensors").stat().st_size < ROOM
    assert (
        dry_run.dry_run(order_for(Request(str(model), "5bpw", effort="balanced")))[1].twin is None
    )

    # The source's own text is another entry of the cache.
    alone = get_sensitivity(job, notes, TOKENS, wish_of(job, never=True))
    assert alone is not None and alone.text.how.startswith("resampled 4 times")
    assert len([e for e in cache.entries() if e.kind == "sensitivities"]) == 2


def test_a_twin_that_is_given_writes_the_text(model: Path, tmp_path: Path) -> None:
    folder = written_twin(model, tmp_path / "twin")
    more: dict[str, Any] = {"effort": "balanced", "smoke": False}
    convert(str(model), "5bpw", tmp_path / "a", twin=str(folder), **more)
    convert(str(model), "5bpw", tmp_path / "b", **more)
    given, alone = (load_sensitivity(tmp_path / n / "mint-sensitivity.npz") for n in "ab")
    size = (folder / "model.safetensors").stat().st_size
    bits = size * 8 / prepare(str(model)).inventory.parameters
    assert given.text.how == f"sampled by a twin of {bits:.2f} bits per weight, seed 0"
    assert alone.text.how == "sampled, seed 0"
    np.testing.assert_array_equal(text_of(folder, model), given.tokens)
    assert (given.tokens != alone.tokens).any()
    assert given.origin == alone.origin


def test_a_twin_of_another_model_is_refused(make: Maker, tmp_path: Path) -> None:
    model = make(qwen3_moe(1), "moe")
    job = prepare(str(model))
    others = {
        "num_hidden_layers": make(qwen3_moe(2), "depth"),
        "model_type": make(llama(1), "family"),
        "no twin of .* has the shapes": make(qwen3_moe(1, experts=8), "experts"),
        "is the model itself": model,
        "made from other weights": written_twin(
            write_checkpoint(tmp_path / "other", qwen3_moe(1), seed=2), tmp_path / "others"
        ),
    }
    for words, folder in others.items():
        with pytest.raises(MintError, match=words):
            given_twin(str(folder), job)

    # The same weights with other words for them.
    folder = write_checkpoint(tmp_path / "words", qwen3_moe(1), seed=1)
    assert given_twin(str(folder), job).path == folder
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first, second, *_ = tokenizer["model"]["vocab"]
    table = tokenizer["model"]["vocab"]
    table[first], table[second] = table[second], table[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MintError, match="its tokenizer has other tokens"):
        given_twin(str(folder), job)


def test_a_twin_that_does_not_fit_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = written_twin(model, tmp_path / "twin"), prepare(str(model))
    monkeypatch.setattr(memory, "machine_limit", lambda: (RESERVE + 1000, True))
    with pytest.raises(MintError, match="does not fit in memory either"):
        given_twin(str(folder), job)
    profile = get_profile(job)
    with pytest.raises(MintError, match="leave --keep-twin out"):
        find_twin(job, wish_of(job, keep=tmp_path / "k"), profile, TOKENS)

    # Then the model writes its text by streamed passes, as without a twin.
    monkeypatch.setattr(twin, "on_cpu", lambda: False)
    assert find_twin(job, wish_of(job), profile, TOKENS) is None
    notes = Notes()
    monkeypatch.setattr(measurements, "_measure_sensitivity", lambda *_: None)
    get_sensitivity(job, notes, TOKENS)
    assert any("the model is streamed for its text" in note for note in notes.said)


def test_no_twin_is_written_where_none_is_of_use(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(model))
    assert wish_of(job) == Wish()  # it fits
    monkeypatch.setattr(memory, "machine_limit", lambda: (RESERVE + ROOM, True))
    assert wish_of(job).writes == (not twin.on_cpu())
    monkeypatch.setattr(twin, "on_cpu", lambda: False)
    assert wish_of(job).writes
    assert not wish_of(job, never=True).writes
    monkeypatch.setattr(twin, "ranks", lambda: Ranks(0, 2))
    assert not wish_of(job).writes


@pytest.mark.usefixtures("small")
def test_a_twin_is_as_large_as_memory_has_room_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(model))
    profile = get_profile(job)

    def size(beside: int, most: int = 1 << 30) -> int:
        monkeypatch.setattr(twin, "room_beside", lambda config, tokens: beside)
        monkeypatch.setattr(twin, "largest_model", lambda: most)
        chosen = find_twin(job, Wish(writes=True), profile, TOKENS)
        return chosen.bytes if isinstance(chosen, Twin) else 0

    smallest = size(-1)
    assert smallest < size(150_000) <= 150_000 < size(190_000) <= 190_000
    assert size(100) == size(smallest) == smallest
    assert size(1 << 30, most=160_000) <= 160_000
    assert size(1 << 30, most=smallest - 1) == 0


def test_what_contradicts_itself_is_refused(cli: Cli, model: Path, tmp_path: Path) -> None:
    ways = (
        (("--effort", "fast", "--twin", "x"), "--twin has no effect"),
        (("--effort", "balanced", "--twin", "x", "--no-twin"), "at most one of"),
        (("--effort", "balanced", "--keep-twin", "out", "-o", "out"), "the same folder"),
        (("--effort", "balanced", "--keep-twin", "x", "--sensitivity", "s"), "has its text"),
    )
    for words, said in ways:
        ran = cli("convert", str(model), "--budget", "5bpw", *words)
        assert ran.code != 0 and said in ran.err, words

    # A folder that holds something else stays as it is.
    (tmp_path / "k").mkdir()
    ran = cli("sensitivity", str(model), "--keep-twin", str(tmp_path / "k"), "--tokens", "1024")
    assert ran.code != 0 and "exists already and is no twin" in ran.err
    assert list((tmp_path / "k").iterdir()) == []


def test_what_is_wrong_with_its_folder_names_the_option(
    cli: Cli, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for keep, why in (
        (tmp_path / "no" / "twin", "does not exist"),
        ("/proc/twin", "cannot be written to"),
        (tmp_path / "link", "is a link"),
        (tmp_path / ("x" * 250), "is not a valid name"),
    ):
        for words in (
            ("convert", model, "--budget", "5bpw", "--effort", "balanced"),
            ("refine", model, "--source", model),
        ):
            ran = cli(*words, "--keep-twin", keep)
            assert (ran.code, ran.err.count("\n")) == (1, 1)
            assert why in ran.err and "--keep-twin" in ran.err and " -o" not in ran.err


def test_a_dry_run_counts_a_twin_that_stays(model: Path, tmp_path: Path) -> None:
    """Its bytes, the time of writing it and its stages, until it stands there."""
    asked: dict[str, Any] = {"budget": "5bpw", "out": tmp_path / "out", "effort": "balanced"}
    plain = order_for(Request(str(model), **asked))
    keeping = order_for(Request(str(model), **asked, keep_twin=tmp_path / "twin"))
    profile = get_profile(keeping.job)
    alone, said = dry_run.dry_run(plain)[1], dry_run.dry_run(keeping)[1]
    lines = "\n".join(dry_run.dry_lines(keeping.job, dry_run.dry_run(keeping)[0], said))
    assert "of it for the twin that stays" in lines and "twin about" in lines
    assert "twin" not in alone.seconds and said.seconds["twin"] > 0
    assert f"{twin.NAME} about" in dry_run.time_note(keeping)

    # What was said is what is written.
    notes = Notes()
    get_sensitivity(keeping.job, notes, TOKENS, keeping.wish, profile)
    size = (tmp_path / "twin" / "model.safetensors").stat().st_size
    assert said.twin_stays == size == said.disk - alone.disk
    assert list(twin.STAGES) == notes.begun[:2]

    # Nothing but the result is written then, by a plan from what was measured.
    plan, after = dry_run.dry_run(keeping)
    other = dry_run.dry_run(plain)[0]
    more = sum(p.layout(keeping.job.inventory).total * sign for p, sign in ((plan, 1), (other, -1)))
    assert (after.twin_stays, after.disk, after.twin) == (0, alone.disk + more, None)
    assert "twin" not in after.seconds
    assert not set(twin.STAGES) & set(expected_stages(keeping, smoke=False))


def test_refining_has_its_text_written_alike(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setattr(refining, "tokens_needed", lambda steps: TOKENS)
    job = prepare(str(model))
    folder = written_twin(model, tmp_path / "checkpoint")

    def text(wish: Wish) -> np.ndarray:
        monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / str(len(list(tmp_path.iterdir())))))
        return refining._text(job, tmp_path, 1, wish, Notes()).tokens

    # The checkpoint itself may write it, and so may a twin that stays.
    given = text(wish_of(job, twin=str(folder)))
    np.testing.assert_array_equal(given, text_of(folder, model))
    kept = text(wish_of(job, keep=tmp_path / "twin"))
    np.testing.assert_array_equal(kept, text_of(tmp_path / "twin", model))
    alone = text(wish_of(job))
    np.testing.assert_array_equal(alone, text_of(model, model))
    assert (alone != given).any() and (alone != kept).any()

    # Without a word, where the source doesn't fit.
    monkeypatch.setattr(memory, "machine_limit", lambda: (RESERVE + ROOM, True))
    monkeypatch.setattr(twin, "on_cpu", lambda: False)
    smaller = text(wish_of(job, keep=tmp_path / "smaller"))
    np.testing.assert_array_equal(text(wish_of(job)), smaller)
    assert (smaller != alone).any()
    ran = cli("refine", folder, "--source", model, "--twin", "x", "--no-twin")
    assert ran.code == 2 and "at most one of --twin" in ran.err


def test_several_machines_keep_no_twin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(request, "ranks", lambda: Ranks(0, 2))
    with pytest.raises(MintError, match="several machines write no twin"):
        request.check_twin(None, tmp_path / "k", False)


@pytest.mark.usefixtures("small")
def test_a_disk_without_room_for_a_twin_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("mint_mlx.base.targets.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(MintError, match=r"--work-dir, or give --no-twin"):
        get_sensitivity(prepare(str(model)), None, TOKENS)
    assert list(temporary.glob("mint-mlx-*")) == []


@pytest.mark.usefixtures("small")
def test_text_that_is_complete_needs_no_twin_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(model))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mint_mlx.measure.rounds.measure", stop)
        get_sensitivity(job, None, TOKENS)
    (notes,) = cache.cache_dir().glob("sensitivities/*-whole")
    monkeypatch.setattr(measurements, "open_twin", None)
    again = get_sensitivity(job, None, TOKENS)
    assert again is not None and "by a twin of" in again.text.how
    assert not notes.exists()


@pytest.mark.usefixtures("small")
def test_killed_while_its_twin_writes_it_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = f"""{SHORT}{SMALL}
import os, sys
from mint_mlx.measure import self_text
from mint_mlx.jobs.measurements import get_sensitivity
from mint_mlx.jobs.model import prepare
self_text.draw = lambda *_: os.kill(os.getpid(), {int(signal.SIGKILL)})
get_sensitivity(prepare(sys.argv[1]), None, {TOKENS})
"""
    env = os.environ | {"MINT_MLX_CACHE": str(tmp_path / "cache-a"), "TMPDIR": str(temporary)}
    words = [sys.executable, "-c", killed, str(model)]
    ran = subprocess.run(words, check=False, capture_output=True, text=True, env=env)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert len(list(temporary.glob("*/twin/model.safetensors"))) == 1

    files = []
    for name in "ab":  # the second with nothing in its cache
        monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / f"cache-{name}"))
        get_sensitivity(prepare(str(model)), None, TOKENS)
        (file,) = cache.cache_dir().glob("sensitivities/*.npz")
        files.append(file.read_bytes())
        assert list(temporary.glob("mint-mlx-*")) == []
    assert files[0] == files[1]


def test_a_twin_that_stays_is_used_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(model))
    wish = wish_of(job, keep=tmp_path / "twin")
    first = get_sensitivity(job, None, TOKENS, wish)
    monkeypatch.setattr(twin, "write", None)
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "empty"))
    again = get_sensitivity(job, None, TOKENS, wish)
    assert first is not None and again is not None
    np.testing.assert_array_equal(first.tokens, again.tokens)

    # Of another model's it is not.
    edit_config(model, rope_theta=20000.0)
    job = prepare(str(model))
    with pytest.raises(MintError, match="is not the twin that would be written"):
        get_sensitivity(job, None, TOKENS, wish_of(job, keep=tmp_path / "twin"))
