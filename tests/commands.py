"""The commands that write, as they are killed and run on full disks, and what counts of a result.

Each runs in a folder of its own, beside `model`, `made` (a conversion of it) and `t.txt`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import qwen3_moe, write_checkpoint

from mint_mlx.base.array_files import read_arrays
from mint_mlx.jobs.convert import convert

# The beginning of a script that runs a command with short texts and few steps.
SHORT = """
from mint_mlx.base.blas import use_fast_blas
use_fast_blas()
from mint_mlx.converters.quantizers import distil, learn_block
from mint_mlx.measure import self_text
from mint_mlx.rules import efforts
efforts.TOKENS = 512
learn_block.STEPS, learn_block.TOKENS = 2, 256
distil.STEPS, distil.TOKENS = 2, 256
self_text.LENGTH = 64
"""

TEXT = ("--text", "../t.txt", "--length", "32", "--windows", "2")

# The words of each command, and the files that count.
WEIGHTS = ("out/model.safetensors", "out/config.json", "out/mint-plan.yaml")
CONVERT = ("../model", "--budget", "5bpw", "-o", "out", "--force", "--no-smoke", "--effort")
WRITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "convert fast": ((*CONVERT, "fast"), WEIGHTS),
    "convert balanced": ((*CONVERT, "balanced"), WEIGHTS),
    "convert best": ((*CONVERT, "best"), WEIGHTS),
    "convert with a twin": (
        (*CONVERT, "balanced", "--keep-twin", "twin"),
        (*WEIGHTS, "twin/model.safetensors"),
    ),
    "profile": (("-o", "p.json", "../model"), ("p.json",)),
    "sensitivity": (("-o", "s.npz", "--tokens", "1024", "../model"), ("s.npz",)),
    "allocate": (
        ("../made/mint-profile.json", "--budget", "5bpw", "-o", "x.yaml", "--force"),
        ("x.yaml",),
    ),
    "refine": (
        ("../made", "--source", "../model", "-o", "r", "--force", "--steps", "40"),
        ("r/model.safetensors", "r/config.json"),
    ),
    "eval": (
        ("../made", "--source", "../model", "--save-reference", "e.safetensors", *TEXT),
        ("e.safetensors",),
    ),
    "compare": (
        ("../model", "--budget", "5bpw", "--methods", "fast,uniform-g64", "--no-speed", *TEXT),
        ("model-compare/results.json",),
    ),
    "cache": (("clear",), ()),
}


def make_inputs(folder: Path) -> None:
    """Write what the commands read; `made` is stored in the cache that is set."""
    source = write_checkpoint(folder / "model", qwen3_moe(2))
    convert(str(source), "5bpw", folder / "made", smoke=False)
    (folder / "t.txt").write_text("pack my box with five dozen jugs " * 20)


def outcome(name: str, folder: Path, cache: Path) -> Any:
    """What counts of a command's results, without measured times; the cache's files by name."""
    files: dict[str, Any] = {}
    for file in WRITES[name][1]:
        data = (folder / file).read_bytes()
        files[file] = _without_times(json.loads(data)) if name == "compare" else data
        if name == "eval":  # whose header has its entries in any order
            arrays, about = read_arrays(folder / file)
            files[file] = {n: a.tobytes() for n, a in arrays.items()}, about
    names = [str(path.relative_to(cache)) for path in cache.rglob("*")]
    return files, sorted(names)


def _without_times(data: Any) -> Any:
    """JSON data without what differs from run to run."""
    if isinstance(data, dict):
        measured = ("second", "memory", "date", "machine")
        return {
            key: _without_times(value)
            for key, value in data.items()
            if not any(word in key for word in measured)
        }
    return [_without_times(value) for value in data] if isinstance(data, list) else data
