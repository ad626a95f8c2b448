"""The command line: exit codes, one sentence an error, JSON and nothing else, instant help."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Cli, Maker, llama, qwen3_moe

from mint_mlx.base import interruption

COMMANDS = (
    "convert",
    "upload",
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
        (("upload", "nowhere", "me/x"), 1),
        (("upload", "MODEL", "me/x"), 1),
        (("upload", "MODEL", "x"), 2),
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
    from mint_mlx.jobs import order

    def bug(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("division by zero")

    folder = str(make(llama(1)))
    monkeypatch.setattr(order, "prepare", bug)
    failed = cli("convert", folder, "--budget", "5bpw")
    assert failed.code == 70
    for word in ("internal error", "report", "ZeroDivisionError"):
        assert word in failed.err
    with pytest.raises(ZeroDivisionError):
        cli("--debug", "convert", folder, "--budget", "5bpw")


def test_an_interruption_says_that_work_is_kept(
    cli: Cli, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mint_mlx.jobs import convert

    command = ("convert", make(llama(1)), "--budget", "5bpw", "-o", tmp_path / "out")
    for stop in (
        signal.default_int_handler,
        lambda *args, **more: signal.raise_signal(signal.SIGTERM),
    ):
        monkeypatch.setattr(
            convert, "write", lambda *args, stop=stop, **more: stop(signal.SIGINT, None)
        )
        stopped = cli(*command)
        assert stopped.code == 130
        assert "resumes from there" in stopped.err


def test_a_launcher_can_end_a_process_that_waits_for_another(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's handlers don't run in a process that waits in MLX: the default one must be set."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        for rank, handler in (("1", signal.SIG_DFL), ("", interruption.interrupt)):
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
