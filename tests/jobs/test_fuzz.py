"""Mutated checkpoints and plans end in a verified result or one sentence: never in a traceback.

Each case is reproducible from its number alone.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers import llama, qwen3_moe, write_checkpoint
from limits import limited
from mutations import mutate_bytes, mutate_header, mutate_json

from mint_mlx import convert
from mint_mlx.base.errors import MintError, explain
from mint_mlx.checkpoint.mlxlm import build_model

LINES = ("x: &a [*a]", "- {layer: x, as: 4bit-g64}", "\t", "layers: 3")  # of a plan
WORDS = ("4bit-g64", "keep", "9bit-g7", "mxfp4", "-1", "[", "null", "*x")


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
    ends = [check(number, sound, tmp_path) for number in range(16)]
    assert 2 < ends.count("written") < 14
    assert len(set(ends)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_mutated_checkpoints_and_plans(
    sound: list[Path], tmp_path: Path, hundred: int
) -> None:
    for number in range(100 * hundred, 100 * hundred + 100):
        check(number, sound, tmp_path)
