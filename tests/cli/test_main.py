"""The command line as a user meets it: exit codes, one sentence an error, JSON and nothing else,
instant help.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers import Cli, Maker, llama, qwen3_moe

from mint_mlx.base.files import lock_folder
from mint_mlx.jobs import steps
from mint_mlx.measure import pass_state

COMMANDS = (
    "convert",
    "inspect",
    "doctor",
    "recipes",
    "demo",
    "profile",
    "sensitivity",
    "allocate",
    "sweep",
    "refine",
    "eval",
    "compare",
    "cache",
)


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['mint-mlx', '--help']\nfrom mint_mlx.cli.main import main\ntry: "
        "main()\nexcept SystemExit as stopped: assert not stopped.code\nheavy = {'mlx', 'numpy', "
        "'transformers', 'huggingface_hub', 'pydantic', 'yaml'} & sys.modules.keys()\nassert not "
        "heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(cli: Cli, command: str) -> None:
    shown = cli(command, "--help")
    assert shown.code == 0
    assert "Usage" in shown.out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((), 2),
        (("convert",), 2),
        (("no-such-command",), 2),
        (("convert", "MODEL", "--bogus"), 2),
        (("convert", "MODEL", "--budget", "19"), 2),
        (("convert", "MODEL", "--budget", "-1GB"), 2),
        (("convert", "MODEL", "--budget", "4bpw", "--uniform", "4bit-g64"), 2),
        (("convert", "MODEL", "--uniform", "4bits"), 2),
        (("convert", "MODEL", "--budget", "5bpw", "--override", "x"), 2),
        (("convert", "MODEL", "--budget", "5bpw", "--public"), 2),
        (("convert", "MODEL", "--budget", "5bpw", "--upload-repo", "nope"), 2),
        (("convert", "nowhere", "--budget", "5bpw"), 1),
        (("convert", "MODEL", "--budget", "10KB"), 1),
        (("convert", "MODEL", "--budget", "5bpw", "--objective", "best"), 2),
        (("convert", "MODEL", "--budget", "5bpw", "--recipe", "nope"), 2),
        (("convert", "MODEL", "--budget", "5bpw", "--quantizer", "nope"), 2),
        (("convert", "MODEL", "--budget", "5bpw", "--override", "nothing=4bit-g64"), 1),
        (("convert", "MODEL", "--plan", "nope.yaml"), 1),
        (("convert", "MODEL", "--budget", "5bpw", "-o", "no/such/folder"), 1),
        (("convert", "MODEL/config.json", "--budget", "5bpw"), 1),
        (("profile", "nowhere"), 1),
        (("profile", "MODEL", "-o", "no/such/p.json"), 1),
        (("allocate", "nope.json", "--budget", "5bpw"), 1),
        (("inspect", "nowhere"), 1),
        (("doctor", "nowhere"), 1),
        (("eval", "nowhere"), 1),
        (("eval", "MODEL", "--seed", "1"), 2),
        (("eval", "MODEL", "--windows", "0"), 2),
        (("eval", "MODEL", "--protocol", "x"), 2),
        (("eval", "MODEL", "--text", "nope.txt"), 1),
        (("eval", "MODEL", "--save-reference", "x.safetensors"), 2),
        (("compare",), 2),
        (("compare", "MODEL"), 2),
        (("compare", "MODEL", "--budget", "5bpw", "--methods", "x"), 2),
        (("compare", "--suite", "nope.yaml"), 1),
        (("recipes", "nope"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_wrong_input_is_one_sentence_and_an_exit_code(
    cli: Cli,
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    code: int,
) -> None:
    folder = make(llama(1))
    monkeypatch.chdir(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    refused = cli(*(a.replace("MODEL", str(folder)) for a in args))
    assert refused.code == code
    if args:
        assert refused.out == ""
        assert "error" in refused.err.lower()
        assert "Traceback" not in refused.err
    if code == 1:
        assert refused.err.startswith("error: ")
        assert len(refused.err.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} - before <= {"cache"}


def test_an_unforeseen_exception_is_an_internal_error(
    cli: Cli, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mint_mlx.jobs import request

    def bug(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("division by zero")

    folder = str(make(llama(1)))
    monkeypatch.setattr(request, "prepare", bug)
    failed = cli("convert", folder, "--budget", "5bpw")
    assert failed.code == 70
    for word in ("internal error", "report", "ZeroDivisionError"):
        assert word in failed.err
    with pytest.raises(ZeroDivisionError):
        cli("--debug", "convert", folder, "--budget", "5bpw")


def test_an_interruption_says_that_work_is_kept(
    cli: Cli, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mint_mlx.converters.output import write

    command = ("convert", make(llama(1)), "--budget", "5bpw", "-o", tmp_path / "out")
    for stop in (
        signal.default_int_handler,
        lambda *args, **more: signal.raise_signal(signal.SIGTERM),
    ):
        monkeypatch.setattr(
            write, "write", lambda *args, stop=stop, **more: stop(signal.SIGINT, None)
        )
        stopped = cli(*command)
        assert stopped.code == 130
        assert "goes on from there" in stopped.err


def test_a_launcher_can_end_a_process_that_waits_for_another(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's handlers don't run in a process that waits in MLX: the default one must be set."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        for rank, handler in (("1", signal.SIG_DFL), ("", signal.default_int_handler)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            monkeypatch.setenv("MLX_RANK", rank)
            assert cli("--help").code == 0
            assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_json_is_one_object_and_nothing_else(
    cli: Cli, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(1)))
    monkeypatch.chdir(tmp_path)

    # In processes of their own, where whatever is imported could print, too.
    for call, code in (
        (("convert", folder, "--json"), 2),
        (("convert", folder, "--budget", "5bpw", "--dry-run", "--json"), 0),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "mint_mlx", *call], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert done.stderr == ""
        assert isinstance(json.loads(done.stdout), dict)

    for call in (
        ("convert", folder, "--budget", "5bpw", "--effort", "fast", "--json"),
        ("profile", folder, "-o", "p.json", "--json"),
        ("allocate", "p.json", "--budget", "5bpw", "-o", "plan.yaml", "--json"),
        ("inspect", folder, "--json"),
        ("inspect", "p.json", "--json"),
        ("inspect", "plan.yaml", "--json"),
        ("inspect", "model-mint-5bpw", "--json"),
        ("recipes", "--json"),
        ("recipes", "default", "--json"),
    ):
        ran = cli(*call)
        assert ran.code == 0
        assert ran.err == ""
        assert isinstance(ran.json, dict)


def test_a_quantized_cache_is_asked_for_in_the_command_that_is_printed(
    cli: Cli, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ("--kv-bits", "8", "-o", "out", "--no-smoke", "--effort", "fast")
    ran = cli("convert", demo_model, "--budget", "5bpw", *more)
    assert ran.code == 0
    last = ran.out.splitlines()[-1]
    assert last == "mlx_lm.generate --model out --kv-bits 8 --quantized-kv-start 0 --prompt Hello"


def test_the_steps_give_what_convert_gives(
    cli: Cli, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(qwen3_moe(2)))
    monkeypatch.chdir(tmp_path)

    # As one job, and what it and the table of sizes say to do next.
    whole = cli("convert", folder, "--budget", "5bpw", "-o", "whole", "--no-smoke")
    assert whole.code == 0
    assert whole.out.splitlines()[-1] == "mlx_lm.chat --model whole"
    sizes = cli("convert", folder, "--effort", "fast")
    assert sizes.code == 2
    assert f"Then: mint-mlx convert {folder} --effort fast --budget 4.5bpw" in sizes.out

    # Step by step: the same weights.
    assert cli("profile", folder, "-o", "p.json").code == 0
    assert cli("allocate", "p.json", "--budget", "5bpw", "-o", "plan.yaml").code == 0
    assert cli("convert", folder, "--plan", "plan.yaml", "-o", "steps", "--no-smoke").code == 0
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("whole", "steps")]
    assert weights[0] == weights[1]

    # The plan in mlx-lm's own form is what config.json says.
    emitted = cli("allocate", "p.json", "--budget", "5bpw", "--emit", "mlx")
    assert emitted.code == 0
    assert emitted.json == json.loads(Path("whole/config.json").read_text())["quantization"]


def test_a_stale_profile_and_a_plan_of_other_weights_are_pointed_out(
    cli: Cli, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make(llama(1)))
    monkeypatch.chdir(tmp_path)
    assert cli("profile", folder, "-o", "p.json").code == 0
    assert cli("allocate", "p.json", "--budget", "5bpw", "-o", "plan.yaml").code == 0
    make(llama(1), seed=3)
    converted = cli("convert", folder, "--plan", "plan.yaml", "--no-smoke")
    assert converted.code == 0
    assert "other weights" in converted.err
    profiled = cli("profile", folder, "-o", "p.json")
    assert profiled.code == 0
    assert "stale" in profiled.err


def test_the_table_of_sizes(cli: Cli, make: Maker) -> None:
    folder = str(make(qwen3_moe(2)))
    sizes = cli("convert", folder)
    assert sizes.code == 2
    for word in ("4.5bpw", "unquantized", "Mac", "No weight has been read"):
        assert word in sizes.out
    assert sizes.out.rstrip().endswith("--budget 4.5bpw")
    large = cli("convert", folder, "--override", "_proj=8bit-g32")  # then 4.5 bits are too few
    assert large.code == 2
    assert large.out.rstrip().endswith("--budget smallest")


@pytest.mark.parametrize("command", ["profile", "sensitivity"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    cli: Cli, command: str, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")
    monkeypatch.setattr(steps, "get_profile", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(steps, "get_sensitivity", lambda *_: pytest.fail("it was measured"))
    refused = cli(command, make(llama(1)), "-o", tmp_path / "closed" / "out.npz")
    assert refused.code == 1
    assert "cannot be written to: check its rights" in refused.err


def test_inspect_draws_equal_blocks_together(cli: Cli, make: Maker, tmp_path: Path) -> None:
    folder, out = make(llama(3)), tmp_path / "out"
    override = r"layers\.[01]\..*down_proj=8bit-g32"
    command = ("convert", folder, "--uniform", "4bit-g64", "--override", override)
    assert cli(*command, "-o", out, "--no-smoke").code == 0
    inspected = cli("inspect", out)
    assert inspected.code == 0
    for group in (
        "model.layers.*.mlp.up_proj",
        "model.layers.[0-1].mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ):
        assert group in inspected.out


def test_the_demo_runs_the_whole_job(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_mlx.cli.demo.WINDOWS", 4)
    ran = cli("demo", "--json")
    assert ran.code == 0
    rows = {row["name"]: row for row in ran.json["rows"]}
    source, ours, uniform = rows["source (bf16)"], rows["mint-mlx"], rows["uniform 4bit-g64"]
    assert ours["bytes"] <= uniform["bytes"] < source["bytes"] / 3
    assert source["perplexity"] < ours["perplexity"] < 1.1 * source["perplexity"]


def test_what_interrupted_walks_left_is_listed_and_dropped(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not what another process is at."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("left", "busy"):
        (tmp_path / f"mint-mlx-walk-{name}").mkdir()
        (tmp_path / f"mint-mlx-walk-{name}" / "hidden-0.safetensors").write_bytes(bytes(1000))
    with lock_folder(tmp_path / "mint-mlx-walk-busy") as busy:
        assert busy is not None
        listed = cli("cache", "--work-dir", tmp_path, "--json")
        assert listed.code == 0
        (entry,) = listed.json["entries"]
        assert entry == {"name": "mint-mlx-walk-left", "kind": "walks", "bytes": 1000}
        assert cli("cache", "clear", "walks", "--work-dir", tmp_path).code == 0
    assert [path.name for path in tmp_path.glob("mint-*")] == ["mint-mlx-walk-busy"]


def test_the_cache_is_listed_and_dropped(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Maker
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli("cache", "--json").json["entries"] == []

    # A profile is listed, as JSON and as a table.
    folder = make(llama(1))
    cli("profile", folder, "-o", folder.parent / "p.json")
    listed = cli("cache", "--json").json
    assert [entry["kind"] for entry in listed["entries"]] == ["profiles"]
    assert listed["bytes"] > 1000
    table = cli("cache")
    assert table.code == 0
    assert "model-" in table.out

    # It is dropped by its own kind only, or with all others.
    assert cli("cache", "clear", "nonsense").code == 2
    assert cli("cache", "clear", "compare").code == 0
    assert "profiles" in str(cli("cache", "--json").json["entries"])
    assert cli("cache", "clear").code == 0
    assert cli("cache", "--json").json["entries"] == []


def test_spills_go_where_they_are_told_to(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, make: Maker
) -> None:
    folder = make(llama(1))
    spills = folder.parent / "spills"
    command = ("sensitivity", folder, "-o", folder.parent / "s.npz", "--work-dir", spills)
    refused = cli(*command)
    assert refused.code == 2
    assert "make it first" in refused.err

    spills.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    seen: list[Path] = []
    keep = pass_state.keep_hidden

    def watched(folder: Path, *more: Any) -> None:
        seen.append(folder.parent)
        keep(folder, *more)

    monkeypatch.setattr(pass_state, "keep_hidden", watched)
    assert cli(*command).code == 0
    assert set(seen) == {spills}
    assert not list(spills.iterdir())
