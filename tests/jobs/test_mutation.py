"""Files of ours that are damaged or forged: never a traceback, and no other result from damage.

Each case is reproducible from its number alone. (Sources and plans: test_fuzz.py.)
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENS, VOCAB, qwen3_moe, write_checkpoint
from limits import in_child, limited, run_cases, run_in_child
from mutations import copy, damage, forge

from mint_mlx.base.array_files import write_arrays, write_tensors
from mint_mlx.base.checksum import DamagedFile, if_sound, with_checksum
from mint_mlx.base.errors import MintError, explain
from mint_mlx.converters.output.refined import REFINED, read_refined
from mint_mlx.converters.output.shard_writer import Writer
from mint_mlx.converters.quantizers.distil_note import read_note
from mint_mlx.converters.quantizers.predictions import read_targets
from mint_mlx.eval import build, chat, compare
from mint_mlx.eval.protocol import Windows
from mint_mlx.eval.reference import About, Predictions, Reference, predict
from mint_mlx.eval.reference_file import load_reference, save_reference
from mint_mlx.eval.score import score
from mint_mlx.jobs import measurements, steps
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.model import Job, prepare
from mint_mlx.measure import cache, fisher, resume
from mint_mlx.measure.curve import curve_to_json
from mint_mlx.measure.profile import measure_curves
from mint_mlx.measure.profile_file import save_profile
from mint_mlx.measure.sample import EXACT
from mint_mlx.measure.sensitivity_file import save_sensitivity
from mint_mlx.measure.text import Text
from mint_mlx.rules.recipes import bundled, read_recipe
from mint_mlx.runtime.runner import Runner, load_shared

Use = Callable[[Path], Any]


@dataclass(frozen=True)
class Target:
    """A file to change, alone or in a folder that is copied with it.

    Attributes:
        origin: the sound file or folder.
        files: patterns of the files in the folder that are changed; none where it is a file.
        use: gives what the program makes of it, comparable; None where it counts as absent.
        edited: whether it is for people to edit: then damage may mean something else.
        weight: how often it is drawn.
    """

    origin: Path
    use: Use
    files: tuple[str, ...] = ()
    edited: bool = False
    weight: int = 10


@dataclass(frozen=True)
class Sound:
    """What all targets are made from."""

    job: Job
    runner: Runner
    folder: Path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("sound")
    job = prepare(str(write_checkpoint(folder / "model", qwen3_moe(1))))
    return Sound(job, load_shared(job.source.path), folder)


@pytest.fixture(scope="module")
def targets(sound: Sound) -> dict[str, Target]:
    return {
        **profile_targets(sound),
        **sensitivity_targets(sound),
        **reference_targets(sound),
        **note_targets(sound),
        **work_targets(sound),
    }


def plain(value: Any) -> str:
    """Any plain data as text, to compare."""
    return json.dumps(value, sort_keys=True, default=str)


def profile_targets(sound: Sound) -> dict[str, Target]:
    """Profiles, by name and in the cache; recipes."""
    job, file = sound.job, sound.folder / "p.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINT_MLX_CACHE", str(sound.folder / "first"))
        save_profile(measurements.get_profile(job, sample=EXACT), file)
    candidates = measurements.profile_candidates(job)

    def in_cache(path: Path) -> Any:
        place = cache.profile_path(job.source, candidates, EXACT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        path.replace(place)
        profile = cache.cached_profile(job.source, candidates, EXACT)
        return profile and plain({p: curve_to_json(c) for p, c in profile.curves.items()})

    def named(path: Path) -> Any:
        return {p: str(c) for p, c in steps.allocate(path, "5bpw").plan.choice.items()}

    def recipe(path: Path) -> Any:
        return read_recipe(path).model_dump()

    return {
        "profile": Target(file, named),
        "cached profile": Target(file, in_cache),
        "recipe": Target(bundled()["default"], recipe, edited=True, weight=5),
    }


def sensitivity_targets(sound: Sound) -> dict[str, Target]:
    """Sensitivities, by name and in the cache; an interrupted walk; the text of one."""
    job, file = sound.job, sound.folder / "s.npz"
    source, inventory = job.source, job.inventory
    save_sensitivity(fisher.measure(source, inventory, Text(TOKENS, "r")), file)

    def named(path: Path) -> Any:
        plan = steps.allocate(sound.folder / "p.json", "5bpw", sensitivity=path).plan
        return {p: str(c) for p, c in plan.choice.items()}

    def in_cache(path: Path) -> Any:
        place = cache.sensitivity_path(source, 7)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        path.replace(place)
        cached = cache.cached_sensitivity(source, inventory, 7)
        return cached and plain({p: trace.tolist() for p, trace in cached.trace.items()})

    # An interrupted walk: all hidden states, and the way back through the block.
    def stop(what: str, done: int, total: int) -> None:
        if "forward" not in what:
            raise KeyboardInterrupt

    walks = sound.folder / "walks"
    walks.mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tempfile, "tempdir", str(walks))
        fisher.measure(source, inventory, Text(TOKENS, "r"), progress=stop, key="k")

    def walk(path: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(path))
            measured = fisher.measure(source, inventory, Text(TOKENS, "r"), key="k")
        return plain({p: trace.tolist() for p, trace in measured.trace.items()})

    walked = ("*/hidden-*", "*/grad-*", "*/part-*")
    return {
        "sensitivity": Target(file, named),
        "cached sensitivity": Target(file, in_cache),
        "walk": Target(walks, walk, walked, weight=2),
    }


def reference_targets(sound: Sound) -> dict[str, Target]:
    """References, by name; stored replies, scores and notes of `compare`."""
    file = sound.folder / "r.safetensors"
    windows = Windows(TOKENS)
    predictions = predict(sound.runner, windows, windows.scored, 4)
    about = About("x", "f", "windows", "t", VOCAB, "k", None, "cpu")
    save_reference(Reference(about, (predictions,)), file)

    def named(path: Path) -> Any:
        read: tuple[Predictions, ...] = load_reference(path).predictions
        scores = [score(sound.runner, p.windows, 4, p) for p in read]
        assert all(s.kl is None or s.kl.min() > -0.01 for s in scores)
        return [s.nll.tolist() for s in scores], [s.kl.tolist() for s in scores if s.kl is not None]

    def stored(name: str, text: str, read: Use) -> Target:
        (sound.folder / name).write_text(with_checksum(text))
        return Target(sound.folder / name, lambda path: if_sound(path, read), weight=4)

    figures: dict[str, Any] = {"seconds": 1.0, "kl": 0.1, "perplexity": 2.0, "window_nll": [1, 2]}
    figures["window_kl"] = [0.1]
    return {
        "reference": Target(file, named),
        "score": stored("f.json", json.dumps(figures), compare._read_figures),
        "note": stored("n.json", json.dumps({"seconds": 1.5, "reason": None}), build._read_note),
        "replies": stored(
            "replies.json",
            json.dumps({"replies": [[1, 2], [3]]}),
            lambda path: chat._read_replies(path, 2, 9),
        ),
    }


def note_targets(sound: Sound) -> dict[str, Target]:
    """What interrupted profiles and texts leave."""
    job = sound.job
    candidates = measurements.profile_candidates(job)
    notes = sound.folder / "notes"
    measured = measure_curves(job.source, job.inventory, candidates, EXACT, target=notes / "p.json")
    expected = plain({p: curve_to_json(c) for p, c in measured.items()})
    written = np.where(np.arange(TOKENS.shape[1]) > 0, 1, TOKENS).astype(np.int32)
    resume.write_tokens(sound.folder / "text" / "s.npz", "sampled-64", written, 1)
    given = np.ones(len(TOKENS), dtype=np.int64)

    def curves(path: Path) -> Any:
        place = path / "p.json"
        again = measure_curves(job.source, job.inventory, candidates, EXACT, target=place)
        return plain({p: curve_to_json(c) for p, c in again.items()})

    def text(path: Path) -> Any:
        read = resume.read_tokens(path / "s.npz", "sampled-64", TOKENS, given)
        return read and (read[0].tolist(), read[1])

    assert curves(copy(notes, sound.folder / "again")) == expected
    return {
        "begun profile": Target(notes, curves, ("p.json.begun-*",), weight=4),
        "begun text": Target(sound.folder / "text", text, ("s.npz.begun-*",)),
    }


def work_targets(sound: Sound) -> dict[str, Target]:
    """A work folder: its journal and shards; files of refining."""
    job = sound.job
    put, count = Writer.put, 0

    def interrupted(writer: Writer, *more: Any) -> None:
        nonlocal count
        count += 1
        if count > 8:
            raise KeyboardInterrupt
        put(writer, *more)

    (sound.folder / "w").mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "put", interrupted)
        convert(str(job.source.path), uniform="4bit-g64", out=sound.folder / "w" / "o", smoke=False)

    def finish(path: Path) -> Any:
        out = path / "o"
        convert(str(job.source.path), uniform="4bit-g64", out=out, smoke=False)
        assert not list(path.glob("*.partial"))
        return (out / "model.safetensors").read_bytes()

    # What distilling leaves: the source's predictions, how far it is, the result.
    layout = job.inventory.layout({})
    spec = layout.tensors["model.norm.weight"].spec
    refined = {spec.name: sound.runner.model.model.norm.weight.astype(mx.bfloat16)}
    scratch = sound.folder / "scratch"
    scratch.mkdir()
    write_tensors(scratch / REFINED, refined)
    shape = (*TOKENS.shape, 5)
    predicted = {"ids": np.ones(shape, dtype=np.int32), "logp": np.full(shape, -2, dtype="f4")}
    write_arrays(scratch / "scratch-targets.safetensors", predicted)
    offsets = {"a": {"scales": np.ones((2, 3), dtype="f4")}}
    noted = {f"{what}.a.scales": offsets["a"]["scales"] for what in ("at", "m", "v", "best")}
    write_arrays(scratch / "scratch-n.safetensors", noted | {"figures": np.array([3.0, 0.5, 0.4])})

    def read_all(path: Path) -> Any:
        tensors = read_refined(path, layout)
        note = if_sound(path / "scratch-n.safetensors", lambda file: read_note(file, offsets, 9))
        targets = if_sound(
            path / "scratch-targets.safetensors",
            lambda file: read_targets(file, Text(TOKENS)),
        )
        return (
            tensors and {n: a.astype(mx.float32).tolist() for n, a in tensors.items()},
            note and {n: a.tolist() for n, a in note.items()},
            targets and (targets.ids.tolist(), targets.logp.tolist()),
        )

    return {
        "work folder": Target(sound.folder / "w", finish, ("*/journal*", "*/*.part"), weight=2),
        "scratch": Target(scratch, read_all, ("scratch-*",)),
    }


def same_or_absent(result: Any, expected: Any) -> bool:
    """Whether damage changed nothing, apart from what counts as absent."""
    if isinstance(result, tuple) and isinstance(expected, tuple):
        pairs = zip(result, expected, strict=True)
        return all(same_or_absent(one, other) for one, other in pairs)
    return result is None or bool(result == expected)


def check(number: int, targets: dict[str, Target], tmp_path: Path) -> str:
    """One case: `same`, `absent`, `other` (of forged files only), or the sentence."""
    rng = random.Random(number)
    names = sorted(targets)
    name = rng.choices(names, [targets[n].weight for n in names])[0]
    target = targets[name]
    path = copy(target.origin, tmp_path / f"{number}-{target.origin.name}")
    files = [file for pattern in target.files for file in sorted(path.glob(pattern))]
    file = rng.choice(files) if files else path
    damaged = rng.random() < 0.5 or target.edited
    where = f"case {number}, {name}, {file.name}, {'damaged' if damaged else 'forged'}"
    try:
        damage(file, rng) if damaged else forge(file, rng)
    except (UnicodeEncodeError, OverflowError):  # it can't be written
        return "same"

    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedFile)
            result = target.use(path)
    except Exception as error:
        sentence = explain(error)
        assert sentence, f"{where}: {type(error).__name__}: {error}"
        assert isinstance(error, MintError | OSError), f"{where}: {type(error).__name__}: {error}"
        assert len(sentence.splitlines()) == 1, f"{where}: {sentence}"
        return sentence
    if result is None:
        return "absent"
    if target.edited or not damaged:
        return "other"
    expected = EXPECTED.setdefault(name, use_sound(target, tmp_path / f"sound {number}"))
    assert same_or_absent(result, expected), where
    return "same"


EXPECTED: dict[str, Any] = {}


def use_sound(target: Target, place: Path) -> Any:
    """What the program makes of the sound file."""
    place.mkdir()
    return target.use(copy(target.origin, place / target.origin.name))


def test_damaged_and_forged_files(targets: dict[str, Target], tmp_path: Path) -> None:
    ends = run_cases(lambda number: check(number, targets, tmp_path), 80)
    assert in_child() or ends.count("absent") > 5
    assert len(set(ends)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(30))
def test_three_thousand_damaged_and_forged_files(tmp_path: Path, hundred: int) -> None:
    cases = range(100 * hundred, 100 * hundred + 100)
    run_in_child(f"{__file__}::test_damaged_and_forged_files", cases, tmp_path)
