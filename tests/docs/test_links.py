"""Links between pages resolve, and the program names pages that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pages
import pytest

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
SOURCES = [
    path
    for top in ("mint_mlx", "converters", "eval", "recipes")
    for path in sorted((pages.ROOT / top).rglob("*"))
    if path.suffix in (".py", ".yaml")
]


@cache
def prose(path: Path) -> str:
    """A page without its blocks of code."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(name)
    return names


def links(path: Path) -> list[str]:
    """The targets of a page's links, pictures included."""
    return [one or two for one, two in LINK.findall(prose(path))]


def target(path: Path, link: str) -> tuple[Path, str]:
    """The file and the anchor that a relative link leads to."""
    name, _, anchor = link.partition("#")
    return (path.parent / name).resolve() if name else path, anchor


@pytest.mark.parametrize("path", pages.all_pages(), ids=lambda p: str(p.relative_to(pages.ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for link in links(path):
        if re.match(r"https?://", link):
            continue
        file, anchor = target(path, link)
        assert file.exists(), f"{link}: there is no such file"
        assert pages.ROOT in file.parents, f"{link}: leads out of the repository"
        assert not anchor or anchor in anchors(file), f"{link}: there is no such heading"


def test_every_page_is_within_two_clicks_of_the_readme() -> None:
    reached = {pages.README}
    for _ in range(2):
        reached |= {
            target(path, link)[0]
            for path in reached
            if path.suffix == ".md"
            for link in links(path)
            if not link.startswith("http")
        }
    assert not [str(p) for p in pages.all_pages() if p not in reached]


def test_the_readme_is_short_and_names_the_two_commands_near_its_top() -> None:
    text = pages.README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 9_000
    assert "make demo" in text[:1500] and "make test" in text[:1500]


def test_mint_and_its_paper_are_linked() -> None:
    for path in (pages.README, pages.DOCS / "method.md"):
        text = path.read_text(encoding="utf-8")
        assert "https://baa.ai/articles/27-mint-beats-gptq-data-free.html" in text
        assert "https://baa.ai/articles/24-mint-paper.html" in text


def test_pages_that_the_program_names_exist() -> None:
    named = {
        (path.name, name)
        for path in SOURCES
        for name in re.findall(r"(?<!ggml's )\bdocs/[\w/.-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert named
    assert not [(path, name) for path, name in named if not (pages.ROOT / name).is_file()]


def test_every_method_that_a_docstring_cites_is_on_the_page_of_methods() -> None:
    method = (pages.DOCS / "method.md").read_text(encoding="utf-8")
    cited = {
        name
        for path in SOURCES
        for name in re.findall(r"([A-Z]\w+) et al\.", path.read_text(encoding="utf-8"))
    }
    assert {"Frantar", "Chee", "Cheng"} <= cited
    assert not [name for name in sorted(cited) if name.replace("Satopaa", "Satopää") not in method]
