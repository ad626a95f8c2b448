"""What is generated in the documentation is what its scripts make now."""

from __future__ import annotations

from pathlib import Path

import make_examples
import make_reference
import make_tables
import pages
import pytest


def test_the_reference_of_the_command_line_is_its_own_help() -> None:
    page = make_reference.PAGE.read_text(encoding="utf-8")
    assert page == make_reference.page(), "run: python docs/make_reference.py"


def test_the_reference_names_every_command_and_option() -> None:
    page = make_reference.PAGE.read_text(encoding="utf-8")
    for command in ("convert", "eval", "compare", "refine", "cache clear"):
        assert f"\n## {command}\n" in page
    for option in ("--budget SIZE", "-o", "--kv-bits", "--baseline-text", "--work-dir FOLDER"):
        assert f"`{option}" in page


@pytest.mark.parametrize("path", make_tables.PAGES, ids=lambda path: path.name)
def test_tables_are_those_of_the_files_that_they_come_from(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert pages.generated_names(page, "table"), "the page shows none"
    assert page == make_tables.page(path), "run: python docs/make_tables.py"


def test_every_table_and_every_example_is_shown_and_exists() -> None:
    texts = [path.read_text(encoding="utf-8") for path in pages.all_pages()]
    tables = {name for text in texts for name in pages.generated_names(text, "table")}
    assert tables == set(make_tables.TABLES)
    markers = [marker for text in texts for marker in pages.generated_names(text, "example")]
    assert {make_examples.read_marker(marker)[0] for marker in markers} == set(
        make_examples.EXAMPLES
    )


def check_pages(printed: dict[str, str]) -> None:
    """Every page that shows one of these examples shows what it printed."""
    for path in pages.all_pages():
        page = path.read_text(encoding="utf-8")
        assert make_examples.filled(page, printed) == page, f"{path.name}: run `make docs`"


def test_quick_examples_print_what_the_pages_show() -> None:
    quick = [name for name, example in make_examples.EXAMPLES.items() if example.quick]
    assert quick
    check_pages(make_examples.run_all(quick))


@pytest.mark.slow
def test_all_examples_print_what_the_pages_show() -> None:
    check_pages(make_examples.run_all(make_examples.EXAMPLES))


def test_examples_that_differ_in_times_only_are_the_same() -> None:
    one = "time  convert about 0.4 s, 12.5 tokens-per-sec\ntook          2.8 s on the CPU"
    two = "time  convert about 3 min 20 s, 9 tokens-per-sec\ntook          1 h 02 min"
    assert make_examples.comparable(one) == make_examples.comparable(two)
    assert make_examples.comparable("4.50 bits") != make_examples.comparable("4.51 bits")


def test_an_example_is_shown_whole_or_in_part() -> None:
    example = make_examples.Example("mint-mlx convert x")
    printed = "\n".join(f"line {i}" for i in range(9))
    assert make_examples.as_console(example, printed, 0, 0).count("line") == 9
    cut = make_examples.as_console(example, printed, 2, 1).splitlines()
    assert cut[1:-1] == ["$ mint-mlx convert x", "line 0", "line 1", "...", "line 8"]
    assert all(len(line) <= make_examples.WIDTH for line in make_examples.broken("word " * 50))


def test_a_part_is_replaced_between_its_markers_only() -> None:
    text = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- example: y -->\nkept\n<!-- end -->\n"
    new = pages.fill(text, "table", lambda name, old: f"{name} was {old}")
    assert new == text.replace("old", "x was old")
