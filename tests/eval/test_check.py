"""Tasks put to a model and its source, and KL by kind of text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Cli, Maker, Notes, llama, qwen3_moe

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.base.units import duration
from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.quantizers.time_estimate import active_weights
from mint_mlx.eval import check as checking
from mint_mlx.eval import check_time, kinds
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.eval.measured import read_measured
from mint_mlx.eval.protocol import Windows
from mint_mlx.eval.settings import Settings
from mint_mlx.eval.tasks import Task, all_tasks
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import prepare

TASKS = (
    Task("letters", ({"role": "user", "content": "abc"},), "abc", ("d",)),
    Task("letters", ({"role": "user", "content": "xy"},), "xy", ("z",)),
    Task("long", ({"role": "user", "content": "a" * 900},), "a" * 900, ("a",)),
    Task("none", ({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), "中", ()),
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "all_tasks", lambda: TASKS)
    monkeypatch.setattr(kinds, "REPLY", 6)
    monkeypatch.setattr(checking, "REPLY", 6)


def test_a_model_is_checked_against_its_source(
    few: None, make: Maker, tmp_path: Path, cli: Cli
) -> None:
    source = make(llama(1))
    out = tmp_path / "out"
    convert.convert(str(source), uniform="2bit-g64", out=out, smoke=False)
    notes = Notes()
    result = checking.check(str(out), str(source), notes)
    assert result["form"] == "completion"
    assert any("longer than the model's context" in note for note in notes.said)
    assert any("none of their characters" in note for note in notes.said)

    # It says roughly how long it will take, and which of its stages is which.
    assert notes.expected == notes.begun == list(checking.STAGES)
    assert any(re.match(r"roughly .* s on this machine", note) for note in notes.said)

    # Progress counts the tasks' tokens, which differ, of the source and of the model.
    lengths = [n + task["tokens"] for n, task in zip((3, 2), result["tasks"], strict=True)]
    assert len(set(lengths)) == 2
    for name in (source.name, out.name):
        steps = [step for step in notes.steps if step[0] == name]
        done = [done for _, done, _ in steps]
        assert done == sorted(done) and set(done) - {0} == {lengths[0], sum(lengths)}
        assert {total for _, _, total in steps} == {sum(lengths)}
    (letters,) = result["kinds"]
    assert letters["tasks"] == 2
    assert letters["kl"] == pytest.approx(result["kl"])
    assert result["kl"] > 0.01
    for task in result["tasks"]:
        assert (task["first_difference"] is None) == (task["source_reply"] == task["model_reply"])

    # The same models answer the same, and the command says the same.
    ran = cli("check", out, "--source", source, "--json")
    assert ran.code == 0
    assert ran.json == result
    (table,) = read_measured(out, load_source(str(out)).fingerprint).tables
    assert [line[0] for line in table.lines] == ["letters", "all"]
    same = checking.check(str(source), str(source))
    assert same["kl"] < 1e-5
    assert all(task["first_difference"] is None for task in same["tasks"])
    assert "all replies are the same" in cli("check", source, "--source", source).out

    # eval tells the same divergence of each kind.
    figures = evaluate(str(out), Settings(kinds=True), source=str(source))
    assert figures["kinds"][0]["kl"] == pytest.approx(letters["kl"])
    assert figures["text"] == "its own replies by kind"


def test_the_time_follows_from_weights_and_the_machine(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setattr(check_time, "product_rate", lambda: 1e9)
    monkeypatch.setattr(check_time, "LOADING", 0.0)
    small, large = (prepare(str(make(llama(n), str(n)))).inventory for n in (1, 3))
    seconds = check_time.check_seconds(small)

    # Four passes over some 4,000 tokens of prompts and 64 of each reply, at least.
    least = 4 * (4000 + 64 * len(all_tasks())) * 2 * active_weights(small) / 1e9
    assert least < seconds < 4 * least
    ratio = active_weights(large) / active_weights(small)
    assert check_time.check_seconds(large) == pytest.approx(ratio * seconds)
    monkeypatch.setattr(check_time, "product_rate", lambda: 2e9)
    assert check_time.check_seconds(small) == pytest.approx(seconds / 2)

    # The command is printed with it after a conversion.
    out = tmp_path / "out"
    words = ("--uniform", "4bit-g64", "-o", out, "--no-smoke")
    ran = cli("convert", tmp_path / "1", *words)
    told = f"(roughly {duration(seconds / 2)}): mint-mlx check {out} --source {tmp_path / '1'}"
    assert told in ran.err


def test_conversations_go_through_the_template_as_far_as_it_takes_them(
    few: None, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(llama(1))
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    asked: list[dict[str, Any]] = []

    def render(folder: Path, conversations: list[dict[str, Any]]) -> list[list[int] | str]:
        asked.extend(conversations)
        return [[5, 6], [7], [8] * 900, "no system prompts"]

    monkeypatch.setattr(kinds, "render", render)
    notes = Notes()
    result = checking.check(str(source), str(source), notes)
    assert result["form"] == "chat"
    assert [task["question"] for task in result["tasks"]] == ["abc", "xy"]
    assert any("kind none: the chat template refuses them (no system" in n for n in notes.said)
    assert all(conversation["enable_thinking"] is False for conversation in asked)


def test_what_cannot_be_checked_is_refused(
    few: None, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(make(llama(1)))
    with pytest.raises(UsageError, match="--kinds compares with the source's own replies"):
        evaluate(source, Settings(kinds=True))
    with pytest.raises(UsageError, match="--kinds scores"):
        Settings(kinds=True, length=32)
    with pytest.raises(UsageError, match="give one of them"):
        Settings(kinds=True, chat=True)
    monkeypatch.setattr(checking, "fits", lambda folder: False)
    with pytest.raises(MintError, match="too large for this machine"):
        checking.check(source, source)
    with pytest.raises(MintError, match="was not made from model: their model_type"):
        checking.check(str(make(qwen3_moe(1), "other")), source)


@pytest.mark.parametrize(
    ("first", "second", "index"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([2], [1], 0)],
)
def test_the_first_token_that_differs(
    first: list[int], second: list[int], index: int | None
) -> None:
    assert checking.first_difference(first, second) == index


def test_figures_of_kinds_are_means_over_tokens() -> None:
    windows = [Windows(np.zeros((1, n), np.int32), first=1) for n in (2, 4, 3)]
    a, b = kinds.by_kind(["a", "b", "a"], windows, [1.0, 5.0, 2.0])
    assert (a["kind"], a["windows"], a["tokens"]) == ("a", 2, 5)
    assert a["kl"] == pytest.approx((2 * 1.0 + 3 * 2.0) / 5)
    assert b["kl_se"] is None
    assert kinds.by_kind(["a", "b"], windows[:2], [1.0])[-1]["kind"] == "a"  # interrupted


def test_small_figures_have_no_exponent() -> None:
    assert kinds.with_error(0.011512, 4.53e-5) == "0.01151 ± 0.000045"
    assert kinds.with_error(46.0912, None) == "46.09"
    assert kinds.with_error(2.345e-7, 0.0) == "0.0000002345 ± 0"
