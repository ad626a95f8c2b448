"""Origins: which weights are the same, as far as is known."""

from __future__ import annotations

import pytest

from mint_mlx.checkpoint.origin import Origin

KNOWN = Origin("org/model", "abc", "structure", "content")


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (KNOWN, True),
        (Origin("another name", None, "structure", "content"), True),
        (Origin("org/model", "abc", "structure", "other content"), False),
        (Origin("org/model", "abc", "other structure", "content"), False),
        (Origin(), True),
        (Origin("org/model", "abc", "other structure", ""), True),
    ],
)
def test_weights_are_told_apart_by_their_hashes_and_nothing_speaks_against_unknown_ones(
    other: Origin, same: bool
) -> None:
    assert KNOWN.matches(other) == same
    assert other.matches(KNOWN) == same


def test_a_fingerprint_names_config_and_weights() -> None:
    assert KNOWN.fingerprint == "structure-content"
