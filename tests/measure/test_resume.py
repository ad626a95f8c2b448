"""Resume notes of an interrupted run: read by the same version only, and gone in the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mint_mlx.measure import resume

TOKENS = np.arange(6, dtype=np.int32).reshape(2, 3)
GIVEN = np.ones(2, dtype=np.int64)


def test_curves_are_read_back_but_for_a_line_that_was_cut_short(tmp_path: Path) -> None:
    place = tmp_path / "notes" / "p.json"
    assert resume.read_curves(place) == {}
    resume.append_curve(place, "a", [1, 2])
    resume.append_curve(place, "b", [3])
    (file,) = place.parent.iterdir()
    file.write_text(file.read_text() + '{"c": [4')
    assert resume.read_curves(place) == {"a": [1, 2], "b": [3]}
    resume.clear(place)
    assert resume.read_curves(place) == {}
    assert not list(place.parent.iterdir())


def test_text_is_read_back_with_how_much_of_it_was_finished(tmp_path: Path) -> None:
    place = tmp_path / "notes" / "s.npz"
    assert resume.read_tokens(place, "sampled-64", TOKENS, GIVEN) is None
    resume.write_tokens(place, "sampled-64", TOKENS, 2)
    read = resume.read_tokens(place, "sampled-64", TOKENS, GIVEN)
    assert read is not None
    np.testing.assert_array_equal(read[0], TOKENS)
    assert read[1] == 2

    # Of another start they are none, wherever it differs among what is given.
    other = TOKENS.copy()
    other[1, 2] += 1
    assert resume.read_tokens(place, "sampled-64", other, GIVEN) is not None
    assert resume.read_tokens(place, "sampled-64", other, GIVEN + 2) is None
    assert resume.read_tokens(place, "resampled", TOKENS, GIVEN) is None


def test_notes_of_another_version_count_for_nothing_and_are_cleared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "p.json"
    resume.append_curve(place, "a", [1])
    resume.write_tokens(place, "sampled-64", TOKENS, 2)
    monkeypatch.setattr(resume, "stamp", lambda: "another")
    assert resume.read_curves(place) == {}
    assert resume.read_tokens(place, "sampled-64", TOKENS, GIVEN) is None
    resume.clear(place)
    assert not list(tmp_path.glob("p.json*"))


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "p.json"
    resume.append_curve(place, "a", [1])
    resume.write_tokens(place, "sampled-64", TOKENS, 2)
    assert resume.read_curves(place) == {}
