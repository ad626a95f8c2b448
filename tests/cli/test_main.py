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
from helpers import Maker, llama, qwen3_moe, run_cli

from mint_mlx.base.files import lock_folder
from mint_mlx.cli import main
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
def test_each_command_has_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run_cli(monkeypatch, command, "--help") == 0
    assert "Usage" in capsys.readouterr().out


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
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    code: int,
) -> None:
    folder = make(llama(1))
    monkeypatch.chdir(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    assert run_cli(monkeypatch, *(a.replace("MODEL", str(folder)) for a in args)) == code
    printed = capsys.readouterr()
    if args:
        assert printed.out == ""
        assert "error" in printed.err.lower() and "Traceback" not in printed.err
    if code == 1:
        assert printed.err.startswith("error: ") and len(printed.err.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} - before <= {"cache"}


def test_an_unforeseen_exception_is_an_internal_error(
    make: Maker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mint_mlx.jobs import request

    def bug(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("division by zero")

    folder = str(make(llama(1)))
    monkeypatch.setattr(request, "prepare", bug)
    assert run_cli(monkeypatch, "convert", folder, "--budget", "5bpw") == 70
    error = capsys.readouterr().err
    assert "internal error" in error and "report" in error and "ZeroDivisionError" in error
    monkeypatch.setattr(sys, "argv", ["mint-mlx", "--debug", "convert", folder, "--budget", "5bpw"])
    with pytest.raises(ZeroDivisionError):
        main.main()


def test_an_interruption_says_that_work_is_kept(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mint_mlx.converters.output import write

    command = ("convert", str(make(llama(1))), "--budget", "5bpw", "-o", str(tmp_path / "out"))
    for stop in (
        signal.default_int_handler,
        lambda *args, **more: signal.raise_signal(signal.SIGTERM),
    ):
        monkeypatch.setattr(
            write, "write", lambda *args, stop=stop, **more: stop(signal.SIGINT, None)
        )
        assert run_cli(monkeypatch, *command) == 130
        assert "goes on from there" in capsys.readouterr().err


def test_a_launcher_can_end_a_process_that_waits_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of Python's runs in a process that waits in MLX: there a signal must do what it does
    by itself.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        for rank, handler in (("1", signal.SIG_DFL), ("", signal.default_int_handler)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            monkeypatch.setenv("MLX_RANK", rank)
            assert run_cli(monkeypatch, "--help") == 0
            assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_json_is_one_object_and_nothing_else(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make(qwen3_moe(1)))
    monkeypatch.chdir(tmp_path)
    calls = [
        ("convert", folder, "--json"),
        ("convert", folder, "--budget", "5bpw", "--dry-run", "--json"),
        ("convert", folder, "--budget", "5bpw", "--effort", "fast", "--json"),
        ("profile", folder, "-o", "p.json", "--json"),
        ("allocate", "p.json", "--budget", "5bpw", "-o", "plan.yaml", "--json"),
        ("inspect", folder, "--json"),
        ("inspect", "p.json", "--json"),
        ("inspect", "plan.yaml", "--json"),
        ("inspect", "model-mint-5bpw", "--json"),
        ("recipes", "--json"),
        ("recipes", "default", "--json"),
    ]
    for call in calls[:2]:  # in processes of their own, where whatever is imported could print, too
        done = subprocess.run(
            [sys.executable, "-m", "mint_mlx", *call], capture_output=True, text=True, check=False
        )
        assert done.returncode == (2 if call == calls[0] else 0), done.stderr
        assert done.stderr == ""
        assert isinstance(json.loads(done.stdout), dict)
    for call in calls[2:]:
        assert run_cli(monkeypatch, *call) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert isinstance(json.loads(printed.out), dict)


def test_a_quantized_cache_is_asked_for_in_the_command_that_is_printed(
    demo_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ("--kv-bits", "8", "-o", "out", "--no-smoke", "--effort", "fast")
    assert run_cli(monkeypatch, "convert", str(demo_model), "--budget", "5bpw", *more) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "mlx_lm.generate --model out --kv-bits 8 --quantized-kv-start 0 --prompt Hello"


def test_the_steps_give_what_convert_gives(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make(qwen3_moe(2)))
    monkeypatch.chdir(tmp_path)
    assert (
        run_cli(monkeypatch, "convert", folder, "--budget", "5bpw", "-o", "whole", "--no-smoke")
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == "mlx_lm.chat --model whole"
    assert run_cli(monkeypatch, "convert", folder, "--effort", "fast") == 2
    assert (
        f"Then: mint-mlx convert {folder} --effort fast --budget 4.5bpw" in capsys.readouterr().out
    )
    assert run_cli(monkeypatch, "profile", folder, "-o", "p.json") == 0
    assert run_cli(monkeypatch, "allocate", "p.json", "--budget", "5bpw", "-o", "plan.yaml") == 0
    assert (
        run_cli(monkeypatch, "convert", folder, "--plan", "plan.yaml", "-o", "steps", "--no-smoke")
        == 0
    )
    assert (
        Path("whole/model.safetensors").read_bytes() == Path("steps/model.safetensors").read_bytes()
    )
    capsys.readouterr()
    assert run_cli(monkeypatch, "allocate", "p.json", "--budget", "5bpw", "--emit", "mlx") == 0
    assert (
        json.loads(capsys.readouterr().out)
        == json.loads(Path("whole/config.json").read_text())["quantization"]
    )


def test_a_stale_profile_and_a_plan_of_other_weights_are_pointed_out(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make(llama(1)))
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "profile", folder, "-o", "p.json") == 0
    assert run_cli(monkeypatch, "allocate", "p.json", "--budget", "5bpw", "-o", "plan.yaml") == 0
    make(llama(1), seed=3)
    capsys.readouterr()
    assert run_cli(monkeypatch, "convert", folder, "--plan", "plan.yaml", "--no-smoke") == 0
    assert "other weights" in capsys.readouterr().err
    assert run_cli(monkeypatch, "profile", folder, "-o", "p.json") == 0
    assert "stale" in capsys.readouterr().err


def test_the_table_of_sizes(
    make: Maker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make(qwen3_moe(2)))
    assert run_cli(monkeypatch, "convert", folder) == 2
    table = capsys.readouterr().out
    assert (
        "4.5bpw" in table
        and "unquantized" in table
        and "Mac" in table
        and "No weight has been read" in table
    )
    assert table.rstrip().endswith("--budget 4.5bpw")
    assert run_cli(monkeypatch, "convert", folder, "--override", "_proj=8bit-g32") == 2
    assert (
        capsys.readouterr().out.rstrip().endswith("--budget smallest")
    )  # all others are more than 4.5 bits


@pytest.mark.parametrize("command", ["profile", "sensitivity"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    command: str,
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")
    monkeypatch.setattr(steps, "get_profile", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(steps, "get_sensitivity", lambda *_: pytest.fail("it was measured"))
    assert (
        run_cli(
            monkeypatch, command, str(make(llama(1))), "-o", str(tmp_path / "closed" / "out.npz")
        )
        == 1
    )
    assert "cannot be written to: check its permissions" in capsys.readouterr().err


def test_inspect_draws_equal_blocks_together(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make(llama(3)))
    out = str(tmp_path / "out")
    override = r"layers\.[01]\..*down_proj=8bit-g32"
    assert (
        run_cli(
            monkeypatch,
            "convert",
            folder,
            "--uniform",
            "4bit-g64",
            "--override",
            override,
            "-o",
            out,
            "--no-smoke",
        )
        == 0
    )
    capsys.readouterr()
    assert run_cli(monkeypatch, "inspect", out) == 0
    lines = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj" in lines
    assert "model.layers.[0-1].mlp.down_proj" in lines and "model.layers.2.mlp.down_proj" in lines


def test_the_demo_runs_the_whole_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mint_mlx.cli.demo.WINDOWS", 4)
    assert run_cli(monkeypatch, "demo", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    source, ours, uniform = rows["source (bf16)"], rows["mint-mlx"], rows["uniform 4bit-g64"]
    assert ours["bytes"] <= uniform["bytes"] < source["bytes"] / 3
    assert source["perplexity"] < ours["perplexity"] < 1.1 * source["perplexity"]


def test_what_interrupted_walks_left_is_listed_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not what another process is at."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("left", "busy"):
        (tmp_path / f"mint-mlx-walk-{name}").mkdir()
        (tmp_path / f"mint-mlx-walk-{name}" / "hidden-0.safetensors").write_bytes(bytes(1000))
    with lock_folder(tmp_path / "mint-mlx-walk-busy") as busy:
        assert busy is not None
        assert run_cli(monkeypatch, "cache", "--work-dir", str(tmp_path), "--json") == 0
        (entry,) = json.loads(capsys.readouterr().out)["entries"]
        assert entry == {"name": "mint-mlx-walk-left", "kind": "walks", "bytes": 1000}
        assert run_cli(monkeypatch, "cache", "clear", "walks", "--work-dir", str(tmp_path)) == 0
    assert [path.name for path in tmp_path.glob("mint-*")] == ["mint-mlx-walk-busy"]


def test_the_cache_is_listed_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Maker
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_cli(monkeypatch, "cache", "--json")
    assert json.loads(capsys.readouterr().out)["entries"] == []
    folder = make(llama(1))
    run_cli(monkeypatch, "profile", str(folder), "-o", str(folder.parent / "p.json"))
    capsys.readouterr()
    run_cli(monkeypatch, "cache", "--json")
    listed = json.loads(capsys.readouterr().out)
    assert [e["kind"] for e in listed["entries"]] == ["profiles"] and listed["bytes"] > 1000
    assert run_cli(monkeypatch, "cache") == 0 and "model-" in capsys.readouterr().out
    assert run_cli(monkeypatch, "cache", "clear", "nonsense") == 2
    assert run_cli(monkeypatch, "cache", "clear", "compare") == 0 and "profiles" in str(
        list_cache(monkeypatch, capsys)
    )
    assert run_cli(monkeypatch, "cache", "clear") == 0
    assert list_cache(monkeypatch, capsys) == []


def list_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[object]:
    capsys.readouterr()
    run_cli(monkeypatch, "cache", "--json")
    return list(json.loads(capsys.readouterr().out)["entries"])


def test_spills_go_where_they_are_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Maker
) -> None:
    folder = make(llama(1))
    spills = folder.parent / "spills"
    command = (
        "sensitivity",
        str(folder),
        "-o",
        str(folder.parent / "s.npz"),
        "--work-dir",
        str(spills),
    )
    assert run_cli(monkeypatch, *command) == 2 and "make it first" in capsys.readouterr().err
    spills.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    seen: list[Path] = []
    keep = pass_state.keep_hidden

    def watched(folder: Path, *more: Any) -> None:
        seen.append(folder.parent)
        keep(folder, *more)

    monkeypatch.setattr(pass_state, "keep_hidden", watched)
    assert run_cli(monkeypatch, *command) == 0
    assert set(seen) == {spills} and not list(spills.iterdir())
