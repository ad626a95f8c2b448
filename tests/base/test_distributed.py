"""Several processes under `mlx.launch` do together what one does, to the byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
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


# Runs one command after another, and tells how each ended.
SEVERAL = """
import json, sys
from mint_mlx.converters.output import publish
from mint_mlx.cli.main import main
publish.check_upload = lambda *args, **more: []
publish.upload = lambda folder, repo, private: 'page-of-' + repo
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as end:
        print('ended with', end.code, flush=True)
"""


Commands = list[list[str]]
Check = Callable[[str, str], None]  # of what two processes said on stdout and stderr


def test_two_processes_do_what_one_does(cli: Cli, make: Maker, tmp_path: Path) -> None:
    """They convert and evaluate, all in one start; the second one's cache is another."""
    source = make(qwen3_moe(2), shards=2)
    conversions, check_conversions = plan_conversions(source, cli, tmp_path)
    evaluations, check_evaluations = plan_evaluations(source, cli, tmp_path)
    other_cache = "os.environ['MINT_MLX_CACHE'] += '-other' * int(os.environ['MLX_RANK'])"
    script = tmp_path / "several.py"
    script.write_text(f"import os\n{other_cache}\n{SEVERAL}")
    said = launch(json.dumps([*conversions, *evaluations]), program=[str(script)])
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("ended with 0") == 2 * 5, said.stdout
    check_conversions(said.stdout, said.stderr)
    check_evaluations(said.stdout, said.stderr)


def plan_conversions(source: Path, cli: Cli, tmp_path: Path) -> tuple[Commands, Check]:
    """Two processes measure, carry out plans, upload once, and refuse what isn't shared."""
    sensitivity, _ = steps.write_sensitivity(str(source), tmp_path / "s.npz", tokens=2048)
    shared = ["--quantizer", "search-gptq", "--sensitivity", str(sensitivity)]
    efforts = {"fast": [], "balanced": shared}
    plans = {effort: tmp_path / f"{effort}.yaml" for effort in efforts}
    for effort, more in efforts.items():
        command = ["convert", source, *more, "--budget", "5bpw", "--effort", effort]
        assert cli(*command, "--no-smoke", "-o", tmp_path / effort).code == 0
        plans[effort].write_bytes((tmp_path / effort / "mint-plan.yaml").read_bytes())

    commands = [["profile", str(source), "-o", str(tmp_path / "two.json"), "--sample", "0.5"]]
    for effort, more in efforts.items():
        out = str(tmp_path / f"{effort}-together")
        command = ["convert", str(source), *more, "--plan", str(plans[effort]), "--no-smoke"]
        commands.append([*command, "-o", out])
    commands[-1] += ["--upload-repo", "me/mine"]
    best = tmp_path / "best"
    refused = ["convert", str(source), "--budget", "5bpw", "--effort", "best", "-o", str(best)]
    commands += [refused, ["recipes"]]

    def check(out: str, err: str) -> None:
        # The same measurements, the same bytes, and one of them speaks.
        steps.write_profile(str(source), tmp_path / "half.json", sample="0.5")
        assert (tmp_path / "half.json").read_bytes() == (tmp_path / "two.json").read_bytes()
        assert out.count("mint-mlx allocate") == 1
        for effort in efforts:
            together = tmp_path / f"{effort}-together"
            folders = (tmp_path / effort, together)
            tensors = [weights(folder)["model.safetensors"] for folder in folders]
            assert tensors[0] == tensors[1]
            assert not list(together.glob("*journal*"))
            assert not (together / "lock").exists()
        assert out.count("uploaded to page-of-me/mine") == 1, out
        assert 'load("me/mine")' in (together / "README.md").read_text()
        assert "--effort balanced" in out + err
        assert not best.exists()
        assert "leave mlx.launch out" in out + err

    return commands, check


def plan_evaluations(source: Path, cli: Cli, tmp_path: Path) -> tuple[Commands, Check]:
    """Two processes split a model between them, and agree with one."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    split = ["eval", str(source), "--source", str(source), "--text", str(text)]
    split += ["--windows", "2", "--length", "64", "--json"]
    alone = cli(*split)
    assert alone.code == 0

    # Only the first rank's cache holds the source's predictions, under the name for two ranks.
    (reference,) = (Path(os.environ["MINT_MLX_CACHE"]) / "references").iterdir()
    reference.rename(reference.with_name(f"{reference.stem}-of2.safetensors"))

    # One key-value head is split by blocks, which takes an index.
    model = tmp_path / "indexed"
    shutil.copytree(DEMO, model)
    with safe_open(model / "model.safetensors", "numpy") as file:
        index = {"weight_map": dict.fromkeys(file.keys(), "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    by_blocks = ["eval", str(model), "--source", str(model)]
    by_blocks += ["--windows", "2", "--length", "32", "--json"]

    def check(out: str, err: str) -> None:
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert len(lines) == 2
        assert lines[0]["perplexity"] == pytest.approx(alone.json["perplexity"], rel=1e-4)
        assert lines[0]["kl"] < 1e-5
        assert lines[0]["same_top1"] == 1
        assert "run `eval` on one" in out + err

        # Each of two processes sees its own blocks' routers only; one alone, later, sees all.
        assert "router_changes" not in lines[1]
        later = cli(*by_blocks)
        assert later.code == 0
        assert later.json["router_changes"] == 0

    return [split, by_blocks, ["eval", str(DEMO), "--windows", "2"]], check


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
