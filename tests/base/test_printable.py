"""Control characters of strangers are written out, wherever a text is printed."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from helpers import Cli, Maker, edit_config, llama

from mint_mlx.base.one_line import one_line
from mint_mlx.base.printable import guard_streams, printable, unguarded
from mint_mlx.cli.output import Output

BAD = "\x1b]0;title\x07\x1b[2J\x9b31m\x08\x7f\r\u202e\u2028\udc80"


def is_clean(text: str) -> bool:
    return all(c.isprintable() or c in "\n" for c in text)


def test_controls_are_written_out_and_nothing_else() -> None:
    assert is_clean(printable(BAD))
    assert printable("a\x1b[1mb") == "a\\x1b[1mb"
    ink = "ß 語 \u00a0 é e\u0301 👩\u200d💻 │ ±"
    assert printable(ink) == ink
    assert printable("a\nb") == "a\\nb"
    assert is_clean(one_line(3, BAD))


def test_all_that_an_output_prints_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (False, True):
        out = Output()
        out._err._force_terminal = terminal
        out.line(BAD)
        out.table([BAD, "bytes"], [[BAD, 1]], BAD)
        out._out.width = 20  # too narrow for a table
        out.table([BAD, "bytes"], [[BAD, 1]], BAD)
        out.note(BAD)
        out.stage(BAD)
        out._last_log = -1000.0
        out.step(BAD, 1, 2)
        out._last_log = -1000.0
        out.detail(BAD)
        out.close()
        out = Output(as_json=True)
        out.result({"name": BAD})

        # On a terminal rich has sequences of its own.
        printed = capsys.readouterr()
        assert is_clean(printed.out)
        assert is_clean(printed.err) or terminal
        assert not any(
            bad in printed.err for bad in ("\x07", "\x1b]0", "\x1b[2J", "\x9b", "\u202e")
        )


def test_what_other_libraries_print_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stdout", raw)
    monkeypatch.setattr(sys, "stderr", raw)
    guard_streams()
    guard_streams()
    assert unguarded(sys.stdout) is raw
    print(f"a{BAD.replace(chr(13), '')}")
    sys.stderr.writelines(["b\x1b[2J\n"])
    handler = logging.StreamHandler()
    handler.emit(logging.makeLogRecord({"msg": "c\x07"}))
    assert is_clean(raw.getvalue())
    assert raw.getvalue().count("\n") == 3

    # Bars return to the start of their line, and go up one.
    sys.stderr.write("\r\x1b[A50%")
    assert raw.getvalue().endswith("\r\x1b[A50%")


def test_a_refusal_that_names_a_stranger_is_clean(cli: Cli, make: Maker, tmp_path: Path) -> None:
    folder = make(llama(1), "mo\x1b[2Jdel")
    edit_config(folder, model_type="lla\x1b[31mma")
    done = cli("inspect", folder)
    assert done.code == 1
    assert is_clean(done.out + done.err)
    assert "\\x1b" in done.err

    # Nor in the words of a command line, which a shell may have filled with the names of files.
    for words in (("inspect", "a", "b\x1b[2J"), ("\x1b[2J",), ("inspect", "--\x1b[2J")):
        done = cli(*words)
        assert done.code == 2
        assert is_clean(done.out + done.err)
        assert "\\x1b" in done.err
