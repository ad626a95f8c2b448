"""A source's card gives a few short texts, and nothing in it fails a conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_mlx.converters.output import card_facts as module
from mint_mlx.converters.output.card_facts import card_facts, guess_base

LICENCE = "license: apache-2.0"


def read(folder: Path, matter: str) -> object:
    (folder / "README.md").write_text(f"---\n{matter}\n---\n# A model\nlicense: mit\n")
    return card_facts(folder)


def test_short_texts_are_read(tmp_path: Path) -> None:
    assert card_facts(tmp_path) == {}
    matter = (
        'datasets:\n- a\n- license: mit\nlicense: other # as below\nlicense_name: "own: 1"\n'
        "license_link: https://example.org/LICENSE\nlanguage:\n  - en\n  - no\ntags: [x]"
    )
    assert read(tmp_path, matter) == {
        "license": "other",
        "license_name": "own: 1",
        "license_link": "https://example.org/LICENSE",
        "language": ["en", "no"],
    }
    assert read(tmp_path, f"{LICENCE}\nlicense: mit") == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    "bad",
    [
        "2024-13-45",
        "2024-01-01T00:00:00+99:99",
        "9" * 5000,
        "0x" + "f" * 3000,
        "1:99:99",
        "!!python/none x",
        "[" * 2000,
        "{a: [b, {c: d}]}",
        "&a [*a]",
        "*nobody",
        "'open",
        '"\\x1b[2J"',
        "x" * 201,
        "",
        "|\n  two\n  lines",
    ],
)
def test_what_is_no_short_text_is_left_out(bad: str, tmp_path: Path) -> None:
    """Dates and numbers that YAML can't build are texts like others."""
    for matter in (f"license_name: {bad}\n{LICENCE}", f"{LICENCE}\ndate: {bad}"):
        facts = read(tmp_path, matter)
        assert isinstance(facts, dict)
        assert facts.pop("license") == "apache-2.0"
        assert all(len(value) <= 200 and value.isprintable() for value in facts.values())


def test_little_of_a_card_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(tmp_path, f"{LICENCE}\nx: {'y' * 70_000}") == {}
    monkeypatch.setattr(module, "MAX_BYTES", 40)
    assert read(tmp_path, LICENCE) == {"license": "apache-2.0"}
    assert read(tmp_path, f"{LICENCE}\nlanguage: en\ntags: [a]") == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert "license" in card_facts(tmp_path)

    # Nor anything through a link out of the folder.
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "README.md").symlink_to(tmp_path / "README.md")
    assert card_facts(tmp_path / "source") == {}


def test_the_name_on_the_hub_is_guessed_from_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "Tiny-1.5B"
    folder.mkdir()
    card = folder / "README.md"
    assert guess_base(folder) is None
    for text, name in (
        ("made of [it](https://huggingface.co/org/Tiny-1.5B/blob/main/LICENSE).", "org/Tiny-1.5B"),
        ('load("org/tiny-1.5b")', "org/tiny-1.5b"),
        ("see https://github.com/org/Tiny-1.5B and org/Tiny-1.5B-GGUF", None),
        ("---\nbase_model: org/Base\n---\n", None),
        ("---\nbase_model: org/Base\nbase_model_relation: quantized\n---\n", "org/Base"),
        ("---\nbase_model: [org/B, x]\nbase_model_relation: quantized\n---\n", "org/B"),
        ("---\nbase_model: {a: b}\nbase_model_relation: quantized\n---\n", None),
    ):
        card.write_text(text)
        assert guess_base(folder) == name, text
