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
from limits import in_child, limited, run_cases, run_in_child
from mutations import mutate_bytes, mutate_header, mutate_json, replace_by_other

from mint_mlx import convert
from mint_mlx.base.errors import MintError, explain
from mint_mlx.checkpoint.mlxlm import build_model

TEXTS = ("README.md", "LICENSE", "chat_template.jinja")
FRONT = (  # of a card
    *("license: mit", "license: [a, {b: c}]", "license: 2024-99-99", "base_model: &a [*a]"),
    *("language: 0x" + "f" * 999, "tags: !!python/object/apply:os.system [true]", "\t:", "- x"),
    *("date: 2024-01-01T00:00:00+99:99", "library_name: \x1b[31m", "x: " + "[" * 999, "a: a: a"),
    *("? [x]", "license: " + "y" * 99_999, "<<: 3", "license_link: ../../etc/passwd"),
)
TEMPLATES = (
    *("{{ x.y.z }}", "{% for %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages"),
    *("", "{% include 'x' %}", "{{ ''.__class__ }}", "{{ strftime_now('%Q') }}", "\x1b[31m"),
)
SECRET = "what a stranger's link leads to"
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
        (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
        (source / "LICENSE").write_text("Do as you like.\n")
        (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
        (source / "generation_config.json").write_text('{"eos_token_id": [0, 1], "top_k": 5}')
        out = folder / f"{source.name}-out"
        convert(str(source), "5bpw", out, smoke=False, effort="fast")
        shutil.copyfile(out / "mint-plan.yaml", source.with_suffix(".yaml"))
    return sources


def mutate(folder: Path, plan: Path, rng: random.Random) -> None:
    """Change one or two of a checkpoint's files, or the plan."""
    names = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")
    configs = [folder / name for name in (*names, "generation_config.json")]
    shards = sorted(folder.glob("*.safetensors"))
    texts = [folder / name for name in ("tokenizer.json", *TEXTS)]

    def json_file() -> None:
        file = rng.choice([c for c in configs if c.is_file()] + [configs[0]] * 3)
        try:
            data = mutate_json(json.loads(file.read_text()), rng)
        except (ValueError, AttributeError, TypeError):  # changed beyond JSON already
            return
        file.write_text(json.dumps(data), encoding="utf-8")

    def any_file() -> None:
        file = rng.choice([*configs, *shards, plan, *texts])
        if file.is_file():
            file.write_bytes(mutate_bytes(file.read_bytes(), rng))

    def one_header() -> None:
        try:
            mutate_header(rng.choice(shards), rng)
        except (ValueError, struct.error, AttributeError, TypeError):
            return

    def plan_line() -> None:
        if not plan.is_file():
            return
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

    def card() -> None:
        if (folder / "README.md").is_dir():
            return
        entries = [rng.choice(FRONT) for _ in range(rng.randint(1, 3))]
        front = "\n".join(["---", *entries, rng.choice(["---", "", "..."])])
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "README.md").write_text(front + "\n# A model\n" * rng.choice([1, 9000]))

    def template() -> None:
        file = folder / "chat_template.jinja"
        if file.is_file():
            file.write_text(rng.choice(TEMPLATES))

    def in_its_place() -> None:
        """A link, a folder or nothing in place of a file."""
        file = rng.choice([*configs, *shards, *texts, plan])
        if file.is_file():
            replace_by_other(file, rng, folder.parent / "secret")

    ways = (json_file, json_file, any_file, any_file, one_header, one_header, plan_line, plan_line)
    for _ in range(rng.randint(1, 2)):
        rng.choice([*ways, card, template, in_its_place])()


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
    for file in out.rglob("*"):
        assert SECRET.encode() not in file.read_bytes(), f"case {number}: {file.name}"
    shutil.rmtree(out)
    return "written"


def test_mutated_checkpoints_and_plans(sound: list[Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    ends = run_cases(lambda number: check(number, sound, tmp_path), 16)
    assert in_child() or 2 < ends.count("written") < 14
    assert len(set(ends)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_mutated_checkpoints_and_plans(tmp_path: Path, hundred: int) -> None:
    cases = range(100 * hundred, 100 * hundred + 100)
    run_in_child(f"{__file__}::test_mutated_checkpoints_and_plans", cases, tmp_path)
