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
from helpers import DEMO, Maker, qwen3_moe, run_cli
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
    command = [
        str(Path(sys.executable).parent / "mlx.launch"),
        "-n",
        "2",
        "--backend",
        "ring",
        "-p",
        port,
    ]
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
    assert ALONE.share(sizes) == set(sizes) and ALONE.gather("x") == ["x"]


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
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    source = make(qwen3_moe(2), shards=2)
    plan, alone = tmp_path / "plan.yaml", tmp_path / "alone"
    command = ["convert", str(source), "--no-smoke"]
    if effort == "balanced":  # a sensitivity that both are given: measuring it has tests of its own
        made = steps.write_sensitivity(str(source), tmp_path / "s.npz", tokens=2048)[0]
        command += ["--sensitivity", str(made)]
    assert (
        run_cli(monkeypatch, *command, "--budget", "5bpw", "--effort", effort, "-o", str(alone))
        == 0
    )
    plan.write_bytes((alone / "mint-plan.yaml").read_bytes())
    together = launch(*command, "--plan", str(plan), "-o", str(tmp_path / "together"))
    assert together.returncode == 0, together.stderr
    one, two = weights(alone), weights(tmp_path / "together")
    assert one["model.safetensors"] == two["model.safetensors"]
    assert (
        not list((tmp_path / "together").glob("*journal*"))
        and not (tmp_path / "together" / "lock").exists()
    )


def test_what_one_rank_wrote_is_kept_when_another_is_lost(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make(qwen3_moe(3)), tmp_path / "out"
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from mint_mlx.converters.output import shard_writer\n"
        "from mint_mlx.base.distributed import ranks\n"
        "def behind():\n"
        f"    journals = Path({str(out)!r} + '.partial').glob('*journal.jsonl')\n"
        "    return min(len(f.read_text().splitlines()) for f in journals) < 2\n"
        "put, left = shard_writer.Writer.put, [4]\n"
        "def stop(self, unit, pieces):\n"
        "    put(self, unit, pieces)\n"
        "    left[0] -= 1\n"
        "    if not left[0] and ranks().rank == 1:\n"
        "        while self._writing: self._writing.popleft().result()\n"
        "        while behind(): time.sleep(0.05)\n"  # the other one may be slower
        "        os._exit(9)\n"
        "shard_writer.Writer.put = stop\n"
        "from mint_mlx.cli.main import main\n"
        "main()\n"
    )
    command = ["convert", str(source), "--uniform", "4bit-g64", "--no-smoke", "-o", str(out)]
    lost = launch(*command, program=[str(script)])
    assert not out.exists(), lost.stdout
    lines = [
        len(f.read_text().splitlines()) for f in (tmp_path / "out.partial").glob("*journal.jsonl")
    ]
    assert len(lines) == 2 and min(lines) >= 2
    assert run_cli(monkeypatch, *command) == 0
    whole = [*command[:-1], str(tmp_path / "whole")]
    assert run_cli(monkeypatch, *whole) == 0
    assert weights(out)["model.safetensors"] == weights(tmp_path / "whole")["model.safetensors"]


def test_eval_splits_the_model_and_agrees(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text := tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    source, script = str(make(qwen3_moe(2))), tmp_path / "own_cache.py"
    command = [
        "eval",
        source,
        "--windows",
        "2",
        "--length",
        "64",
        "--json",
        "--text",
        str(text),
        "--source",
        source,
    ]
    assert run_cli(monkeypatch, *command) == 0
    alone = capsys.readouterr().out
    (made,) = (Path(os.environ["MINT_MLX_CACHE"]) / "references").iterdir()
    made.rename(made.with_name(f"{made.stem}-of2.safetensors"))  # as two of them name it
    script.write_text(  # the first one's cache holds the source's predictions, the other's is empty
        "import os\n"
        "os.environ['MINT_MLX_CACHE'] += '' if os.environ['MLX_RANK'] == '0' else '-other'\n"
        "from mint_mlx.cli.main import main\n"
        "main()\n"
    )
    together = launch(*command, program=[str(script)])
    assert together.returncode == 0, together.stderr
    one, two = (json.loads(text.strip().splitlines()[-1]) for text in (alone, together.stdout))
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
    assert two["kl"] < 1e-5 and two["same_top1"] == 1
    cannot = launch("eval", str(DEMO), "--windows", "2")  # one key-value head, and no index
    assert "run `eval` on one" in cannot.stdout + cannot.stderr


def test_what_is_split_by_blocks_leaves_no_half_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of two processes sees the choices of its own blocks' routers; one alone, later, sees
    all.
    """
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    with safe_open(model / "model.safetensors", "numpy") as file:
        index = {"weight_map": dict.fromkeys(file.keys(), "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    command = [
        "eval",
        str(model),
        "--windows",
        "2",
        "--length",
        "32",
        "--json",
        "--source",
        str(model),
    ]
    together = launch(*command)
    assert together.returncode == 0, together.stderr
    assert "router_changes" not in json.loads(together.stdout.strip().splitlines()[-1])
    assert run_cli(monkeypatch, *command) == 0
    assert json.loads(capsys.readouterr().out)["router_changes"] == 0


def test_one_of_them_uploads(make: Maker, tmp_path: Path) -> None:
    script = tmp_path / "upload.py"
    script.write_text(
        "from mint_mlx.checkpoint import hub\n"
        "hub.check_upload = lambda *args, **more: None\n"
        "hub.upload = lambda folder, repo, private: 'page-of-' + repo\n"
        "from mint_mlx.cli.main import main\n"
        "main()\n"
    )
    command = [
        "convert",
        str(make(qwen3_moe(1))),
        "--uniform",
        "4bit-g64",
        "--no-smoke",
        "-o",
        str(tmp_path / "out"),
    ]
    done = launch(*command, "--upload-repo", "me/mine", program=[str(script)])
    assert done.returncode == 0 and done.stdout.count("uploaded to page-of-me/mine") == 1, (
        done.stdout
    )
    assert 'load("me/mine")' in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_shared_is_refused(make: Maker, tmp_path: Path) -> None:
    source = str(make(qwen3_moe(1)))
    best = launch(
        "convert", source, "--budget", "5bpw", "--effort", "best", "-o", str(tmp_path / "o")
    )
    assert "--effort balanced" in best.stderr + best.stdout and not (tmp_path / "o").exists()
    assert "leave mlx.launch out" in (refused := launch("recipes")).stderr + refused.stdout
