"""Runs the commands that the pages show and writes what they print: `python docs/make_examples.py`.

The demo model that ships with the program is copied into a temporary folder; each command of
EXAMPLES runs there, in this order, without a network and with a cache of its own. What it prints
goes between `<!-- example: NAME -->` and `<!-- end -->`, lines of more than 100 columns broken
between words. `<!-- example: NAME 5+3 -->` shows the first five lines and the last three.

    python docs/make_examples.py             all of them, some minutes
    python docs/make_examples.py --quick     those that take a second or two
    python docs/make_examples.py --check     write nothing; exit code 1 where a page differs

Times, speeds, memory and dates differ from run to run: what differs in nothing else stays as it is.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pages import ROOT, all_pages, fill, generated_names, write_or_check

DEMO = ROOT / "mint_mlx" / "demo" / "demo-moe"
WIDTH = 100
PROGRAMS = {
    "mint-mlx": ("-m", "mint_mlx"),
    "mlx_lm.generate": ("-m", "mlx_lm", "generate"),
    "python": (),
}


@dataclass(frozen=True)
class Example:
    """A command line, as a reader types it.

    Attributes:
        command: what is typed; one line of a shell.
        quick: whether it takes a second or two and needs nothing of the examples before it.
    """

    command: str
    quick: bool = False


EXAMPLES = {
    "sizes": Example("mint-mlx convert demo-moe", quick=True),
    "fit": Example("mint-mlx convert demo-moe --fit 32GiB --context 32768 --dry-run --effort fast"),
    "too small": Example("mint-mlx convert demo-moe --budget 1bpw", quick=True),
    "convert": Example("mint-mlx convert demo-moe --budget 4.5bpw"),
    "generate": Example(
        "mlx_lm.generate --model demo-moe-mint-4.5bpw --prompt 'The history of the city' "
        "--max-tokens 40"
    ),
    "files": Example("ls demo-moe-mint-4.5bpw"),
    "eval": Example("mint-mlx eval demo-moe-mint-4.5bpw --source demo-moe --windows 16"),
    "sizes known": Example("mint-mlx convert demo-moe"),
    "dry run": Example("mint-mlx convert demo-moe --budget 4bpw --dry-run"),
    "inspect": Example("mint-mlx inspect demo-moe-mint-4.5bpw"),
    "doctor": Example("mint-mlx doctor demo-moe-mint-4.5bpw"),
    "sweep": Example("mint-mlx sweep demo-moe-mint-4.5bpw"),
    "allocate": Example("mint-mlx allocate demo-moe-mint-4.5bpw --budget 4bpw -o plan.yaml"),
    "plan": Example("cat plan.yaml"),
    "edit": Example("""sed -i.old 's/lm_head, as: "[^"]*"/lm_head, as: "8bit-g64"/' plan.yaml"""),
    "edited dry run": Example("mint-mlx convert demo-moe --plan plan.yaml --dry-run"),
    "edited": Example(
        "mint-mlx convert demo-moe --plan plan.yaml --sensitivity demo-moe-mint-4.5bpw "
        "-o demo-moe-edited"
    ),
    "python": Example(
        """python -c 'from mint_mlx import convert, evaluate
result = convert("demo-moe", uniform="4bit-g64", out="from-python")
print(result)
print(evaluate(str(result.path), source="demo-moe", windows=4))'"""
    ),
    "cache": Example("mint-mlx cache"),
}

CHANGES = (  # what differs from run to run, or from machine to machine
    r"\d[\d.,]* (tokens/s|tokens-per-sec)",
    r"\b\d[\d.]* (s|min|h)( \d\d (s|min))?\b",
    r"Peak memory: [\d.]+ GB",
    r"took  .*",
    r"\b20\d\d-\d\d-\d\d\b",
)


def run_example(example: Example, folder: Path) -> str:
    """What a command prints: notes first, then the output, then the error."""
    words = shlex.split(example.command)
    if words[0] in PROGRAMS:
        words = [sys.executable, *PROGRAMS[words[0]], *words[1:]]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "MINT_MLX_CACHE": str(folder / "cache"),
        "LC_ALL": "C.UTF-8",
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        words, cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr:
        raise RuntimeError(f"{example.command}\n{done.stderr}")

    said = done.stderr.splitlines()
    notes = [line for line in said if line.startswith("note: ")]
    errors = [line for line in said if line.startswith("error: ")]
    text = "\n".join([*notes, done.stdout.rstrip(), *errors]).strip("\n")
    return text.replace(str(folder / "cache"), "~/.cache/mint-mlx")


def as_console(example: Example, printed: str, first: int, last: int) -> str:
    """A command and what it printed, as a block of Markdown.

    Args:
        example: the command.
        printed: by it.
        first, last: how many lines are shown; all where both are 0.
    """
    lines = [line for long in printed.splitlines() for line in broken(long)]
    if first + last and len(lines) > first + last:
        lines = [*lines[:first], "...", *lines[len(lines) - last :]]
    lines = [f"$ {example.command}", *(line.rstrip() for line in lines)]
    return "\n".join(["```console", *lines, "```"])


def broken(line: str) -> list[str]:
    """A line in pieces of at most WIDTH columns, broken between words; tables stay whole."""
    if len(line) <= WIDTH or not line[0].isalnum():
        return [line]
    return textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False)


def comparable(block: str) -> str:
    """A block without what differs from run to run, nor where its lines are broken."""
    for pattern in CHANGES:
        block = re.sub(pattern, "#", block)
    return re.sub(r"\s+", " ", block)


def read_marker(marker: str) -> tuple[str, int, int]:
    """An example's name and how many lines are shown of it, from `NAME` or `NAME 5+3`."""
    name, _, shown = marker.rpartition(" ")
    if name and re.fullmatch(r"\d+\+\d+", shown):
        first, last = map(int, shown.split("+"))
        return name, first, last
    return marker, 0, 0


def filled(text: str, printed: dict[str, str]) -> str:
    """A page with those of its examples that were run."""

    def make(marker: str, old: str) -> str:
        name, first, last = read_marker(marker)
        if name not in EXAMPLES:
            raise KeyError(f"a page shows the example {name!r}, which is none of EXAMPLES")
        if name not in printed:
            return old
        new = as_console(EXAMPLES[name], printed[name], first, last)
        return old if comparable(old) == comparable(new) else new

    return fill(text, "example", make)


def run_all(names: Iterable[str], tell: Callable[[str], object] = lambda _: None) -> dict[str, str]:
    """What each example prints, run in order in one temporary folder."""
    printed = {}
    with tempfile.TemporaryDirectory(prefix="mint-mlx-docs-") as scratch:
        folder = Path(scratch)
        shutil.copytree(DEMO, folder / "demo-moe")
        for name in names:
            tell(f"$ {EXAMPLES[name].command}")
            printed[name] = run_example(EXAMPLES[name], folder)
    return printed


def main(quick: bool, check: bool) -> int:
    """Run the examples and write, or check, the pages that show them."""
    names = [name for name, example in EXAMPLES.items() if example.quick or not quick]
    printed = run_all(names, print)
    different = []
    for path in all_pages():
        text = path.read_text(encoding="utf-8")
        if generated_names(text, "example"):
            different.append(write_or_check(path, filled(text, printed), check))
    return 1 if check and any(different) else 0


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv, "--check" in sys.argv))
