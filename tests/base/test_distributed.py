"""Several processes under `mlx.launch` do together what one does, to the byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import DEMO, Cli, Maker, qwen3_moe
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mint_mlx.base.distributed import ALONE, Ranks
from mint_mlx.jobs import steps


def launch(
    *arguments: str, program: Sequence[str] = ("-m", "mint_mlx")
) -> subprocess.CompletedProcess[str]:
    """Run the command line, or another program of ours, in two processes on this machine."""
    port = str(random.randrange(20_000, 60_000))
    launcher = str(Path(sys.executable).parent / "mlx.launch")
    command = [launcher, "-n", "2", "--backend", "ring", "-p", port]
    command += ["--env", f"MINT_MLX_CACHE={os.environ['MINT_MLX_CACHE']}", "--"]
    command += [sys.executable, *program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def weights(folder: Path) -> dict[str, bytes]:
    return {
        f.name: f.read_bytes()
        for f in folder.iterdir()
        if f.suffix in (".safetensors", ".yaml", ".npz")
    }


@given(
    sizes=st.dictionaries(st.text(max_size=5), st.integers(0, 1000), max_size=30),
    size=st.integers(1, 5),
)
def test_every_layer_is_some_ranks_and_none_has_much_more(sizes: dict[str, int], size: int) -> None:
    shares = [Ranks(rank, size).share(sizes) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] + 1 for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0) + 1
    assert ALONE.share(sizes) == set(sizes)
    assert ALONE.gather("x") == ["x"]


def test_two_processes_measure_what_one_does(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(make(qwen3_moe(2), shards=2))
    profiled = launch("profile", source, "-o", str(tmp_path / "two.json"), "--sample", "0.5")
    assert profiled.returncode == 0, profiled.stderr
    assert profiled.stdout.count("Next:") == 1  # one of them speaks
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "another"))
    steps.write_profile(source, tmp_path / "half.json", sample="0.5")
    assert (tmp_path / "half.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_two_processes_write_the_bytes_of_one(
    cli: Cli, make: Maker, tmp_path: Path, effort: str
) -> None:
    source = make(qwen3_moe(2), shards=2)
    alone, together = tmp_path / "alone", tmp_path / "together"
    command = ["convert", str(source), "--no-smoke"]
    if effort == "balanced":  # both are given a sensitivity: measuring it has tests of its own
        sensitivity, _ = steps.write_sensitivity(str(source), tmp_path / "s.npz", tokens=2048)
        command += ["--sensitivity", str(sensitivity)]
    assert cli(*command, "--budget", "5bpw", "--effort", effort, "-o", alone).code == 0

    # Two processes carry out the same plan.
    plan = tmp_path / "plan.yaml"
    plan.write_bytes((alone / "mint-plan.yaml").read_bytes())
    launched = launch(*command, "--plan", str(plan), "-o", str(together))
    assert launched.returncode == 0, launched.stderr
    assert weights(alone)["model.safetensors"] == weights(together)["model.safetensors"]
    assert not list(together.glob("*journal*"))
    assert not (together / "lock").exists()


# Ends rank 1 after four units, as soon as both ranks' journals hold two.
LOST = """
import os, time
from pathlib import Path
from mint_mlx.converters.output import shard_writer
from mint_mlx.base.distributed import ranks

def behind():  # the other rank may be slower
    journals = Path(OUT + '.partial').glob('*journal.jsonl')
    return min(len(f.read_text().splitlines()) for f in journals) < 2

put, units = shard_writer.Writer.put, [4]

def stop(self, unit, pieces):
    put(self, unit, pieces)
    units[0] -= 1
    if not units[0] and ranks().rank == 1:
        while self._writing: self._writing.popleft().result()
        while behind(): time.sleep(0.05)
        os._exit(9)

shard_writer.Writer.put = stop
from mint_mlx.cli.main import main
main()
"""


def test_what_one_rank_wrote_is_kept_when_another_is_lost(
    cli: Cli, make: Maker, tmp_path: Path
) -> None:
    source = make(qwen3_moe(3))
    out = tmp_path / "out"
    whole = tmp_path / "whole"
    script = tmp_path / "lost.py"
    script.write_text(f"OUT = {str(out)!r}\n{LOST}")
    command = ["convert", str(source), "--uniform", "4bit-g64", "--no-smoke", "-o"]
    lost = launch(*command, str(out), program=[str(script)])
    assert not out.exists(), lost.stdout
    journals = (tmp_path / "out.partial").glob("*journal.jsonl")
    lines = [len(journal.read_text().splitlines()) for journal in journals]
    assert len(lines) == 2
    assert min(lines) >= 2

    # One process finishes what two began, as if it had been alone from the start.
    assert cli(*command, out).code == 0
    assert cli(*command, whole).code == 0
    assert weights(out)["model.safetensors"] == weights(whole)["model.safetensors"]


# Rank 0 has the cache of this process, rank 1 an empty one.
OTHER_CACHE = """
import os
os.environ['MINT_MLX_CACHE'] += '' if os.environ['MLX_RANK'] == '0' else '-other'
from mint_mlx.cli.main import main
main()
"""


def test_eval_splits_the_model_and_agrees(cli: Cli, make: Maker, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    source = str(make(qwen3_moe(2)))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    command = ["eval", source, "--source", source, "--text", str(text)]
    command += ["--windows", "2", "--length", "64", "--json"]
    alone = cli(*command)
    assert alone.code == 0

    # Only the first rank's cache holds the source's predictions, under the name for two ranks.
    (reference,) = (Path(os.environ["MINT_MLX_CACHE"]) / "references").iterdir()
    reference.rename(reference.with_name(f"{reference.stem}-of2.safetensors"))
    script = tmp_path / "other_cache.py"
    script.write_text(OTHER_CACHE)
    together = launch(*command, program=[str(script)])
    assert together.returncode == 0, together.stderr
    one, two = (json.loads(out.strip().splitlines()[-1]) for out in (alone.out, together.stdout))
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
    assert two["kl"] < 1e-5
    assert two["same_top1"] == 1

    # One key-value head, and no index: neither heads nor files can be split.
    cannot = launch("eval", str(DEMO), "--windows", "2")
    assert "run `eval` on one" in cannot.stdout + cannot.stderr


def test_what_is_split_by_blocks_leaves_no_half_reference(cli: Cli, tmp_path: Path) -> None:
    """Each of two processes sees its own blocks' routers only; one alone, later, sees all."""
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    with safe_open(model / "model.safetensors", "numpy") as file:
        index = {"weight_map": dict.fromkeys(file.keys(), "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    command = ["eval", str(model), "--source", str(model)]
    command += ["--windows", "2", "--length", "32", "--json"]
    together = launch(*command)
    assert together.returncode == 0, together.stderr
    assert "router_changes" not in json.loads(together.stdout.strip().splitlines()[-1])
    alone = cli(*command)
    assert alone.code == 0
    assert alone.json["router_changes"] == 0


def test_one_of_them_uploads(make: Maker, tmp_path: Path) -> None:
    script = tmp_path / "upload.py"
    script.write_text(
        "from mint_mlx.checkpoint import hub\n"
        "hub.check_upload = lambda *args, **more: None\n"
        "hub.upload = lambda folder, repo, private: 'page-of-' + repo\n"
        "from mint_mlx.cli.main import main\n"
        "main()\n"
    )
    out = tmp_path / "out"
    command = ["convert", str(make(qwen3_moe(1))), "--uniform", "4bit-g64", "--no-smoke"]
    command += ["-o", str(out), "--upload-repo", "me/mine"]
    done = launch(*command, program=[str(script)])
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("uploaded to page-of-me/mine") == 1, done.stdout
    assert 'load("me/mine")' in (out / "README.md").read_text()


def test_what_cannot_be_shared_is_refused(make: Maker, tmp_path: Path) -> None:
    source = str(make(qwen3_moe(1)))
    out = tmp_path / "out"
    best = launch("convert", source, "--budget", "5bpw", "--effort", "best", "-o", str(out))
    assert "--effort balanced" in best.stderr + best.stdout
    assert not out.exists()
    recipes = launch("recipes")
    assert "leave mlx.launch out" in recipes.stderr + recipes.stdout
