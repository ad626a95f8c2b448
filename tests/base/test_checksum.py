"""Checksums: a changed byte is seen, an older file without one is taken, work goes on without."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_mlx.base.checksum import (
    Damaged,
    DamagedFile,
    if_sound,
    parse_checked,
    read_checked,
    with_checksum,
)
from mint_mlx.base.errors import MintError

TEXT = '{"a": [1, 2.5], "b": "\N{SNOWMAN}"}'
DATA = {"a": [1, 2.5], "b": "\N{SNOWMAN}"}


def test_a_file_is_read_back_without_its_checksum(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(with_checksum(TEXT), encoding="utf-8")
    assert read_checked(tmp_path / "f") == DATA


def test_a_file_of_an_earlier_version_has_none() -> None:
    assert parse_checked(TEXT, old='{"a": ') == DATA
    for old in (None, '{"b": '):
        with pytest.raises(Damaged):
            parse_checked(TEXT, old)


def test_no_changed_byte_gives_other_data(tmp_path: Path) -> None:
    whole = with_checksum(TEXT).encode()
    for place in range(len(whole)):
        for bit in (1, 8, 128):
            changed = bytearray(whole)
            changed[place] ^= bit
            (tmp_path / "f").write_bytes(changed)
            with pytest.raises(Damaged):
                read_checked(tmp_path / "f")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": 1} x'])
def test_what_is_no_json_is_damaged(text: str) -> None:
    with pytest.raises(Damaged):
        parse_checked(text, old="")


def test_work_goes_on_without_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    assert if_sound(file, read_checked) is None
    file.write_text(with_checksum(TEXT)[:-1])
    with pytest.warns(DamagedFile, match="made anew"):
        assert if_sound(file, read_checked) is None

    # A file of another version is none of these, and a folder in its place neither.
    def of_another_version(_: Path) -> None:
        raise MintError("another version")

    if_sound(file, of_another_version)
    file.unlink()
    file.mkdir()
    assert if_sound(file, read_checked) is None
