"""The report of a checkpoint: its numbers are those of the plan, and nothing in it is a stranger's
markup."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser, find_driver
from helpers import Cli, Maker, llama, qwen3_moe, write_checkpoint

from mint_mlx.base.errors import MintError
from mint_mlx.base.files import MEASURED_FILE
from mint_mlx.base.folders import CHECKPOINT
from mint_mlx.base.pictures import is_page, is_picture
from mint_mlx.base.remove import find_stranger, known_files
from mint_mlx.base.units import human
from mint_mlx.eval import make_report as reports
from mint_mlx.eval.card import show_in_card
from mint_mlx.eval.checkpoint_facts import read_facts
from mint_mlx.eval.kinds import with_error
from mint_mlx.eval.measured import MeasuredTable, keep_table, read_measured
from mint_mlx.eval.page import MOST_BYTES, Page, Passage, Section, Table, render
from mint_mlx.eval.pictures.size_curve import UniformPoint
from mint_mlx.eval.report_page import checkpoint_page, uniform_at
from mint_mlx.eval.settings import Settings
from mint_mlx.jobs import convert
from mint_mlx.rules import efforts

EVIL = '<script>alert("x")</script>\x1b]0;title\x07\u202e&`'


class Parsed(HTMLParser):
    """A page's texts, tags with their attributes, and cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def count(self, tag: str) -> int:
        """How many elements of a kind."""
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """A source, a checkpoint of it with its report, and the text that was scored."""
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINT_MLX_CACHE", str(folder / "cache"))
        patch.setattr(efforts, "TOKENS", 512)
        patch.setattr("mint_mlx.measure.self_text.LENGTH", 64)
        source = write_checkpoint(folder / "source", qwen3_moe(2))
        out = folder / "checkpoint"
        convert.convert(str(source), "5bpw", out, effort="balanced", smoke=False)
        letters = np.random.default_rng(0).choice(list("abcdefgh ijkl"), 600)
        text = folder / "scored.txt"
        text.write_text("".join(letters))
        settings = Settings(windows=2, text=str(text), length=64)
        reports.make_report(out, str(source), settings)
        yield source, out, text


def test_the_page_tells_what_the_plan_and_the_scores_say(made: tuple[Path, Path, Path]) -> None:
    out = made[1]
    text = (out / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    facts = read_facts(out)

    # Sizes and scores.
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    figures = facts.measured.figures
    assert figures is not None and figures["windows"] == 2
    shown = " ".join(parsed.texts)
    for wanted in (
        human(size),
        with_error(figures["kl"], figures["kl_se"]),
        f"{figures['same_top1']:.1%}",
    ):
        assert wanted in shown
    assert facts.plan is not None and facts.plan.origin.fingerprint in shown
    assert sum(layer.bytes for layer in facts.model.layers) < size

    # Each layer's loss counts once, and the whole is what the plan says.
    assert facts.expectation is not None and facts.plan.loss is not None
    assert sum(facts.expectation.losses.values()) == pytest.approx(facts.plan.loss, rel=0.05)
    assert facts.expectation.is_kl and len(facts.expectation.uniform) == 6

    # The worst token stands in its context, with both probabilities.
    worst = figures["spread"]["worst"][0]
    assert worst["kl"] <= figures["kl_max"] + 1e-12
    assert f"{worst['source']:.2%}" in shown and parsed.count("mark") == 20
    for share in ("tokens", "kl"):
        assert sum(figures["spread"][share]) == pytest.approx(1)


def test_the_page_is_small_whole_and_loads_nothing(made: tuple[Path, Path, Path]) -> None:
    out = made[1]
    text = (out / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"https?:|//\w|@import|<script|<link|<img", text)
    for _, attributes in parsed.tags:
        assert not attributes.keys() & {"src", "srcset", "action"}
        for key in ("href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith("#")

    # Sections that are linked are there; pictures and tables can be read by others than eyes.
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for t, a in parsed.tags if t == "a" and a["href"]}
    assert {"plan", "loss", "size", "tokens", "macs", "provenance"} == targets <= set(ids)
    pictures = [a for t, a in parsed.tags if t == "svg"]
    assert len(pictures) == 10 and all(len(a["aria-label"] or "") > 40 for a in pictures)
    assert parsed.count("table") == parsed.count("thead") == parsed.count("caption")
    assert "prefers-color-scheme: dark" in text and '<html lang="en">' in text


def test_what_is_written_is_known_as_ours(made: tuple[Path, Path, Path]) -> None:
    out = made[1]
    names = [f"{name}.png" for name in reports.PICTURES]
    assert all(is_picture(out / name) for name in names) and is_page(out / "report.html")
    assert find_stranger(out, CHECKPOINT) is None
    assert {*names, "report.html", MEASURED_FILE} <= set(known_files(out, CHECKPOINT))

    # The card shows the pictures and the figures once, however often the report is made.
    facts = read_measured(out, read_facts(out).fingerprint)
    shown = {f"{name}.png": alt for name, alt in reports.PICTURES.items()}
    show_in_card(out, shown, facts.figures)
    card = (out / "README.md").read_text()
    assert all(card.count(f"({name})") == 1 for name in names)
    assert card.count("KL divergence from") == 1


def test_a_report_writes_over_nothing_of_others(
    made: tuple[Path, Path, Path], tmp_path: Path, make: Maker
) -> None:
    out = shutil.copytree(made[1], tmp_path / "copy")
    (out / "report.html").write_text("mine")
    with pytest.raises(MintError, match=r"report\.html that mint-mlx did not write"):
        reports.make_report(out)
    assert (out / "report.html").read_text() == "mine"
    with pytest.raises(MintError, match="was not written by mint-mlx"):
        reports.check_report(make(llama(1)))
    with pytest.raises(MintError, match="download it first"):
        reports.check_report("org/name")


def test_a_source_that_is_wrong_is_refused_where_all_is_measured_too(
    made: tuple[Path, Path, Path], make: Maker, cli: Cli
) -> None:
    page = (made[1] / "report.html").read_bytes()
    for source, why in (
        ("no such", "no such does not exist"),
        ("/no/such.safetensors", "there is no reference /no/such.safetensors"),
        (make(llama(1)), "was not made from model: their model_type"),
    ):
        ran = cli("report", made[1], "--source", source)
        assert (ran.code, ran.err.count("\n"), ran.out) == (1, 1, "")
        assert why in ran.err
    assert (made[1] / "report.html").read_bytes() == page
    assert cli("report", made[1], "--source", made[0]).code == 0


def test_scores_of_other_weights_are_not_shown(made: tuple[Path, Path, Path]) -> None:
    out = made[1]
    fingerprint = read_facts(out).fingerprint
    assert read_measured(out, fingerprint).figures is not None
    assert read_measured(out, "another").figures is None


def test_further_tables_become_sections(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    facts = read_facts(made[1])
    (tmp_path / MEASURED_FILE).write_bytes((made[1] / MEASURED_FILE).read_bytes())
    for value in ("0.1", "0.2"):
        table = MeasuredTable("By kind of text", "Two texts.", ("text", "KL"), (("code", value),))
        keep_table(tmp_path, facts.fingerprint, table)
    later = read_facts(made[1], notes=tmp_path)
    assert later.measured.figures == facts.measured.figures
    sections = checkpoint_page(later).sections
    assert [s.title for s in sections].count("By kind of text") == 1
    assert sections[-2].tables[0].lines == (("code", "0.2"),)


def test_figures_by_kind_stand_beside_those_of_a_text(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(made[1], tmp_path / "copy")
    facts = read_facts(out)
    assert facts.measured.figures is not None
    kind = {"kind": "code", "windows": 2, "tokens": 9, "kl": 0.0123, "kl_se": 0.001}
    by_kind = {**facts.measured.figures, "kl": 0.5, "text": "replies", "kinds": [kind]}
    reports.report_figures(out, by_kind, "source.safetensors")
    later = read_facts(out)
    assert later.measured.figures == facts.measured.figures
    assert later.measured.tables[0].lines[0][0] == "code"
    assert "Divergence by kind of text" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [("kl", "<b>"), ("text", 3), ("spread", {}), ("windows", -1), ("kl_se", [])],
)
def test_numbers_of_strangers_are_checked(
    made: tuple[Path, Path, Path], tmp_path: Path, key: str, value: Any
) -> None:
    from mint_mlx.base.checksum import DamagedFile, read_checked, with_checksum

    data = read_checked(made[1] / MEASURED_FILE)
    data["figures"][key] = value
    (tmp_path / MEASURED_FILE).write_text(with_checksum(json.dumps(data)))
    with pytest.warns(DamagedFile):
        assert read_measured(tmp_path, data["fingerprint"]).figures is None


def test_texts_of_strangers_are_escaped() -> None:
    table = Table(EVIL, (EVIL, EVIL), ((EVIL, Passage(EVIL, EVIL, EVIL)),))
    section = Section("one", EVIL, (EVIL,), (), (table,), ((EVIL, EVIL),))
    text = render(Page(EVIL, EVIL, ((EVIL, EVIL),), (section,)))
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not any(c in text for c in "\x1b\x07\u202e")
    assert Parsed(text).count("script") == 0


def test_uniform_at_equal_bytes_lies_between_its_sizes() -> None:
    points = [UniformPoint("4bit-g64", 100, 0.1), UniformPoint("5bit-g64", 121, 0.001)]
    assert uniform_at(points, 110) == pytest.approx(0.01)
    assert uniform_at(points, 100) == pytest.approx(0.1)
    assert uniform_at(points, 99) is None and uniform_at(points, 122) is None


def test_commands_write_reports(cli: Cli, make: Maker, tmp_path: Path) -> None:
    """`convert --report` shows what is known; `eval --report` needs a source."""
    source = make(llama(1))
    out = tmp_path / "out"
    ran = cli("convert", source, "--uniform", "4bit-g64", "-o", out, "--no-smoke", "--report")
    assert ran.code == 0 and "report.html: written" in ran.out
    text = (out / "report.html").read_text()
    assert "Not known: no errors were measured" in text and "Not measured" in text
    assert cli("convert", source, "--report").code == 2
    assert cli("convert", source, "--budget", "5bpw", "--plot", tmp_path / "x.png").code == 2
    assert cli("eval", out, "--report").code == 2
    assert cli("report", out, "--windows", "1").code == 2
    done = cli("report", out, "--json")
    assert done.json["page"] == str(out / "report.html")


def test_a_comparison_writes_a_page_of_its_own(cli: Cli, make: Maker, tmp_path: Path) -> None:
    source, text, out = make(llama(1)), tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(np.random.default_rng(0).choice(list("abcdefgh ijkl"), 600)))
    options = ("--windows", "2", "--length", "64", "--text", text, "--no-speed", "-o", out)
    methods = ("--methods", "nmse,uniform-g64")
    ran = cli("compare", source, "--budget", "5bpw", *methods, *options, "--report")
    assert ran.code == 0 and str(out / "report.html") in ran.out

    # Each row's figures stand in it, and it loads nothing.
    page = (out / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(page)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"nmse", "uniform-g64"}
    for row in rows:
        assert f"{row['bytes']:,}" in parsed.texts
        assert f"{row['kl']:.5f}" in page
    assert len(page.encode()) < MOST_BYTES and parsed.count("svg")
    assert not re.search(r"https?:|//\w|@import|<script|<link|<img", page)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page(made: tuple[Path, Path, Path], width: int, dark: bool) -> None:
    """Nothing is wider than the window, the console is silent, colours follow the reader."""
    driver = find_driver()
    if driver is None:
        pytest.skip("Chromium and its driver are not installed (apt install chromium-driver)")
    with browser(driver) as session:
        session.open(made[1] / "report.html", width, dark)
        inner, outer = session.run(
            "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        )
        assert inner <= outer == width
        background = session.run("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") != dark
        shown = "return [...document.querySelectorAll('svg')].filter(e => e.clientWidth).length"
        assert session.run(shown) == 5
        beyond = (
            "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') &&"
            " !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1).length"
        )
        assert session.run(beyond) == 0
        captions = (
            "return [...document.querySelectorAll('caption')].filter(e => e.offsetParent &&"
            " e.getBoundingClientRect().right > innerWidth + 1).length"
        )
        assert session.run(captions) == 0  # a wide table scrolls, what it is can be read
        assert session.log() == []
