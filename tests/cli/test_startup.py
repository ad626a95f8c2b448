"""What the command line does before MLX is imported: refuse wrong words, complete right ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mint_mlx.cli.options import app

HEAVY = ("mlx", "mlx_lm", "transformers", "matplotlib")
WRONG = (
    ("convert", "m", "--budget", "19"),
    ("convert", "m", "--budget", "5bpw", "--effort", "heroic"),
    ("convert", "m", "--effort", "heroic"),
    ("convert", "m", "--fit", "huge"),
    ("convert", "m", "--fit", "32GiB", "--context", "0"),
    ("convert", "m", "--fit", "32GiB", "--kv-bits", "7"),
    ("convert", "m", "--budget", "5bpw", "--override", "x"),
    ("convert", "m", "--override", "(=4bit-g64"),
    ("convert", "m", "--uniform", "4bits"),
    ("convert", "m", "--uniform", "4bit-g64", "--effort", "best"),
    ("convert", "m", "--budget", "5bpw", "--uniform", "4bit-g64"),
    ("convert", "m", "--budget", "5bpw", "--objective", "best"),
    ("convert", "m", "--budget", "5bpw", "--quantizer", "awq"),
    ("convert", "m", "--budget", "5bpw", "--sample", "2"),
    ("convert", "m", "--budget", "5bpw", "--parts", "vision"),
    ("convert", "m", "--plan", "plan.yaml", "--effort", "best"),
    ("allocate", "p.json", "--budget", "19"),
    ("allocate", "p.json", "--budget", "5bpw", "--override", "x"),
    ("allocate", "p.json", "--budget", "5bpw", "--emit", "gguf"),
)


def test_wrong_words_are_refused_before_mlx_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mint_mlx.cli.main import main\n"
        f"for words in {WRONG!r}:\n"
        "    sys.argv = ['mint-mlx', *words]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stopped:\n"
        "        assert stopped.code == 2, (words, stopped.code)\n"
        f"    heavy = set({HEAVY!r}) & sys.modules.keys()\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(WRONG)


def test_a_plan_is_read_before_mlx_is_imported(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("mint_mlx_plan: 0\n")
    code = (
        "import sys\n"
        "from mint_mlx.cli.main import main\n"
        "sys.argv = ['mint-mlx', 'convert', 'm', '--plan', 'plan.yaml']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stopped:\n"
        f"    sys.exit(10 * stopped.code + len(set({HEAVY!r}) & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 10, done.stderr
    assert "plan.yaml, line 1" in done.stderr


@pytest.mark.parametrize(
    ("words", "completed"), [("mint-mlx conv", "convert"), ("mint-mlx convert --bud", "--budget")]
)
def test_a_shell_completes_commands_and_options(words: str, completed: str) -> None:
    code = "import sys; sys.argv = ['mint-mlx']\nfrom mint_mlx.cli.main import main\nmain()"
    typed = {
        "_MINT_MLX_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | typed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed in done.stdout.split(), done.stderr


def test_completion_can_be_installed() -> None:
    assert app._add_completion
