"""YAML from strangers: plain data with line numbers, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_mlx.base import yamlfile
from mint_mlx.base.errors import MintError
from mint_mlx.base.yamlfile import line_of, read_yaml

TEXT = """name: x
rules:
- roles: [head]
  floor: 8
- roles: [router]
"""


@pytest.mark.parametrize(
    ("location", "line"),
    [
        ((), 1),
        (("name",), 1),
        (("rules",), 2),
        (("rules", 0, "floor"), 4),
        (("rules", 1), 5),
        (("rules", 1, "nosuch"), 5),
        (("rules", 9), 2),
        (("nosuch",), 1),
    ],
)
def test_a_location_has_the_line_of_the_last_node_on_the_way(
    tmp_path: Path, location: tuple[str | int, ...], line: int
) -> None:
    (tmp_path / "r.yaml").write_text(TEXT)
    data, node = read_yaml(tmp_path / "r.yaml", "recipe")
    assert data["rules"][0] == {"roles": ["head"], "floor": 8}
    assert line_of(node, location) == line


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: &x [1]\nb: *x\n", "line 2: YAML aliases are not allowed"),
        (b"a: 1\nb: {c: 1, c: 2}\n", "line 2: 'c' is given twice"),
        (b"a:\n- {[1, 2]: 3}\n", "line 2: a key is a list or a table"),
        (b"a: [1,\n", "line 2 is not a readable recipe"),
        (b"\xff\xfe", "save it as YAML in UTF-8"),
        (b"[" * 100_000, "not a readable recipe"),
        (b"a: " + b"1" * 1000, "too large for a recipe"),
        (b"- {layer: x, as: keep}\n" * 60_000, "too large for a recipe"),
        (b"x: &a [*a]\n", "line 1: YAML aliases are not allowed"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, problem: str
) -> None:
    if len(content) < 2000 and "too large" in problem:
        monkeypatch.setattr(yamlfile, "MAX_BYTES", 1000)
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(MintError, match=problem):
        read_yaml(tmp_path / "r.yaml", "recipe")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MintError, match=r"there is no recipe .*r\.yaml"):
        read_yaml(tmp_path / "r.yaml", "recipe")
