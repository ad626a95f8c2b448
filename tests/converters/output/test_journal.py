"""The journal of a work folder: a damaged line costs its module, a damaged first line all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mint_mlx.base.checksum import DamagedFile, with_checksum
from mint_mlx.converters.output.journal import combine, read_journal

ENTRIES = [
    {"source": "x", "versions": {}},
    {"unit": "a", "hash": combine(["00"]), "hashes": ["00"]},
    {"unit": "b", "hash": combine(["11"]), "hashes": ["11"]},
]
LINES = [with_checksum(json.dumps(entry)) + "\n" for entry in ENTRIES]


def test_entries_are_read_back_with_or_without_checksums(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    assert read_journal(journal) == []
    journal.write_text("".join(LINES))
    assert read_journal(journal) == ENTRIES
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    assert read_journal(journal) == ENTRIES

    # A line that a kill cut short is nothing that anyone needs to hear of.
    journal.write_text("".join(LINES)[:-9])
    assert read_journal(journal) == ENTRIES[:2]


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        ([LINES[0], LINES[1].replace('"a"', '"b"'), LINES[2]], [ENTRIES[0], ENTRIES[2]]),
        ([LINES[0], '{"unit": ["a"], "hash": "x"}\n', LINES[2]], [ENTRIES[0], ENTRIES[2]]),
        ([LINES[0], "\udcff\n", "[1]\n", "3\n", LINES[2]], [ENTRIES[0], ENTRIES[2]]),
        ([LINES[0].replace("x", "y"), *LINES[1:]], []),
        (["[]\n", *LINES[1:]], []),
    ],
)
def test_a_damaged_line_is_left_out(
    damaged: list[str], expected: list[object], tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_text("".join(damaged), errors="surrogateescape")
    with pytest.warns(DamagedFile, match="written anew"):
        assert read_journal(journal) == expected
