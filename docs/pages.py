"""The documentation's pages, and the parts of them that are generated.

A generated part stands between `<!-- KIND: NAME -->` and `<!-- end -->`. `make docs` writes all of
them anew; tests/docs holds them equal to what the scripts here make.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def all_pages() -> list[Path]:
    """README, CONTRIBUTING, and every page of docs/."""
    return [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def generated_names(text: str, kind: str) -> list[str]:
    """The names of a page's generated parts of one kind."""
    return re.findall(rf"<!-- {kind}: (.+?) -->\n", text)


def fill(text: str, kind: str, make: Callable[[str, str], str]) -> str:
    """A page with its generated parts of one kind made anew.

    Args:
        text: the page.
        kind: what stands before the colon of the marker.
        make: called with a part's name and its present text, returns its new text.
    """
    part = re.compile(rf"<!-- {kind}: (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)

    def replace(match: re.Match[str]) -> str:
        name, old = match.groups()
        return f"<!-- {kind}: {name} -->\n{make(name, old.rstrip())}\n<!-- end -->"

    return part.sub(replace, text)


def write_or_check(path: Path, text: str, check: bool) -> bool:
    """Write a page, or only compare it; True where it was different."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if old == text:
        return False
    if not check:
        path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {'differs' if check else 'written'}")
    return True
