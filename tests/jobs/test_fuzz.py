"""Mutated checkpoints and plans end in a verified result or one sentence: never in a traceback.

Each case is reproducible from its number alone.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import llama, qwen3_moe, write_checkpoint

from mint_mlx import convert
from mint_mlx.base.errors import MintError, explain
from mint_mlx.checkpoint.mlxlm import build_model

SECONDS = 60  # more than any case takes
NAN, INF = float("nan"), float("inf")
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**12, -(10**9), 1.5, NAN, INF, 1e-30),
    *("", "x", "../x", "/etc/passwd", "\ud800", "4"),
    *([], [1], [[]], {}, {"a": 1}, [None] * 3, "yarn", {"type": "linear"}),
)

LINES = ("x: &a [*a]", "- {layer: x, as: 4bit-g64}", "\t", "layers: 3")  # of a plan
WORDS = ("4bit-g64", "keep", "9bit-g7", "mxfp4", "-1", "[", "null", "*x")
KEYS = ("x", "../y", "model_file", "auto_map", "quantization", "text_config")  # of a config


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints to mutate, and a plan for each."""
    folder = tmp_path_factory.mktemp("sound")
    sources = [
        write_checkpoint(folder / "dense", llama(1)),
        write_checkpoint(folder / "tied", llama(1, tied=True)),
        write_checkpoint(folder / "moe", qwen3_moe(1), shards=2),
    ]
    for source in sources:
        out = folder / f"{source.name}-out"
        convert(str(source), "5bpw", out, smoke=False, effort="fast")
        shutil.copyfile(out / "mint-plan.yaml", source.with_suffix(".yaml"))
    return sources


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if at:
        yield at
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from paths_of(inner, (*at, key))


def mutate_json(data: Any, rng: random.Random) -> Any:
    """Replace, drop, double or rename something in it."""
    *way, last = rng.choice(list(paths_of(data)) or [("x",)])
    table = data
    for key in way:
        table = table[key]

    how = rng.randrange(4)
    value = table.get(last) if isinstance(table, dict) else table[last]
    if how == 0 and isinstance(table, dict):
        table.pop(last, None)
    elif how == 1 and isinstance(table, dict):
        table[rng.choice(KEYS)] = value
    elif isinstance(value, int) and rng.random() < 0.5:
        table[last] += rng.choice([-1, 1, 8, -64, 10**9])
    else:
        table[last] = rng.choice(JUNK)
    return data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(max(1, min(len(changed), rng.choice([16, 400, 10**9]))))
        how = rng.randrange(4)
        if how == 0 and changed:
            changed[place % len(changed)] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[place : place + rng.choice([1, 8, 10**6])]
        elif how == 2:
            changed[place:place] = changed[place : place + rng.randint(1, 50)]
        else:
            changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    return bytes(changed)


def mutate_header(file: Path, rng: random.Random) -> None:
    """Change a safetensors file's header, with its length set right."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    changed = mutate_json(json.loads(data[8 : 8 + length]), rng)
    header = json.dumps(changed).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def mutate(folder: Path, plan: Path, rng: random.Random) -> None:
    """Change one or two of a checkpoint's files, or the plan."""
    names = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")
    texts = [folder / name for name in names]
    shards = sorted(folder.glob("*.safetensors"))

    def json_file() -> None:
        file = rng.choice([t for t in texts if t.is_file()] + [texts[0]] * 3)
        try:
            data = mutate_json(json.loads(file.read_text()), rng)
        except (ValueError, AttributeError, TypeError):  # changed beyond JSON already
            return
        file.write_text(json.dumps(data), encoding="utf-8")

    def any_file() -> None:
        file = rng.choice([*texts, *shards, plan, folder / "tokenizer.json"])
        if file.is_file():
            file.write_bytes(mutate_bytes(file.read_bytes(), rng))

    def one_header() -> None:
        try:
            mutate_header(rng.choice(shards), rng)
        except (ValueError, struct.error, AttributeError, TypeError):
            return

    def plan_line() -> None:
        lines = plan.read_text(errors="replace").splitlines()
        place = rng.randrange(len(lines))
        how = rng.randrange(4)
        if how == 0:
            del lines[place]
        elif how == 1:
            lines.insert(place, rng.choice([lines[place], *LINES]))
        else:
            words = lines[place].split(" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[place] = " ".join(words)
        plan.write_text("\n".join(lines))

    for _ in range(rng.randint(1, 2)):
        rng.choice([json_file, any_file, one_header, plan_line])()


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("this case hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(number: int, sound: list[Path], tmp_path: Path) -> str:
    """One case: `written`, or the sentence."""
    rng = random.Random(number)
    origin = rng.choice(sound)
    folder = tmp_path / f"m{number}"
    plan = folder.with_suffix(".yaml")
    out = tmp_path / f"out{number}"
    shutil.copytree(origin, folder)
    shutil.copyfile(origin.with_suffix(".yaml"), plan)
    mutate(folder, plan, rng)

    # By the plan, or by a budget and sometimes with a sentence.
    more: dict[str, Any] = {"plan": plan, "smoke": False}
    if rng.randrange(2):
        budget = rng.choice(["5bpw", "smallest"])
        more = {"budget": budget, "smoke": rng.random() < 0.2, "effort": "fast"}
    try:
        with limited():
            convert(str(folder), out=out, **more)
    except Exception as error:
        sentence = explain(error)
        assert sentence, f"case {number}: {type(error).__name__}: {error}"
        assert isinstance(error, MintError | OSError), (
            f"case {number}: {type(error).__name__}: {error}"
        )
        assert len(sentence.splitlines()) == 1, f"case {number}: {sentence}"
        assert not out.exists(), f"case {number}: half a result"
        return sentence
    finally:
        shutil.rmtree(folder)
    build_model(out)
    shutil.rmtree(out)
    return "written"


def test_mutated_checkpoints_and_plans(sound: list[Path], tmp_path: Path) -> None:
    ends = [check(number, sound, tmp_path) for number in range(60)]
    assert 5 < ends.count("written") < 55
    assert len(set(ends)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_mutated_checkpoints_and_plans(
    sound: list[Path], tmp_path: Path, hundred: int
) -> None:
    for number in range(100 * hundred, 100 * hundred + 100):
        check(number, sound, tmp_path)
