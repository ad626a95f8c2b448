"""KL divergence by kind of text: the source's own replies to bundled tasks of several kinds.

The tasks (tasks.py) go through the chat template where the model has one. A template may refuse
some, as many know no system prompt: those are left out with a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import MintError
from ..base.one_line import listed
from ..base.report import Report
from ..checkpoint.chat_template import render
from ..checkpoint.source import Source
from ..checkpoint.tokenizer import encode, load_tokenizer
from .chat import greedy_replies
from .protocol import Windows, context_of
from .stats import mean_and_se
from .tasks import Task, all_tasks

REPLY = 64  # tokens a reply at most


@dataclass(frozen=True)
class Asked:
    """Tasks with the source's replies.

    Attributes:
        tasks: those that it could be asked.
        prompts: token ids of each.
        replies: token ids of the source's greedy reply to each.
        chat: whether they went through a chat template.
    """

    tasks: tuple[Task, ...]
    prompts: list[list[int]]
    replies: list[list[int]]
    chat: bool

    @property
    def windows(self) -> list[Windows]:
        """A window for each task, of which the reply is scored."""
        return [
            Windows(np.array([prompt + reply], dtype=np.int32), first=len(prompt))
            for prompt, reply in zip(self.prompts, self.replies, strict=True)
        ]

    @property
    def kinds(self) -> list[str]:
        """The kind of each task."""
        return [task.kind for task in self.tasks]


def ask(source: Source, option: str, report: Report) -> Asked:
    """The source's replies to all tasks that it can be asked.

    Args:
        source: a model that fits in memory.
        option: that asked for it, for an error's advice.
        report: is told of tasks that are left out.

    Raises:
        MintError: the source is too large, its chat template doesn't end, or no task is left.
    """
    tokenizer = load_tokenizer(source.path)
    chat = tokenizer.chat_template is not None
    tasks = all_tasks()
    if chat:
        rendered = _conversations(source.path, tasks)
    else:
        rendered = [[int(i) for i in encode(tokenizer, task.base)] for task in tasks]

    # What can't be asked is told, a kind and a reason at a time.
    room = (context_of(source.config) or 1 << 30) - REPLY
    asked: list[Task] = []
    prompts: list[list[int]] = []
    reasons: dict[str, dict[str, None]] = {}
    for task, prompt in zip(tasks, rendered, strict=True):
        problem = _problem(prompt, room)
        if problem is not None:
            reasons.setdefault(problem, {})[task.kind] = None
        elif not isinstance(prompt, str):
            asked.append(task)
            prompts.append(prompt)
    for problem, kinds in reasons.items():
        report.note(f"left out of tasks of the kind {listed(list(kinds))}: {problem}")
    if not asked:
        raise MintError(f"no task can be put to {source.name}: leave {option} out")

    report.stage("replies of the source")
    replies = greedy_replies(source, prompts, REPLY, option, report)
    return Asked(tuple(asked), prompts, replies, chat)


def _conversations(folder: Path, tasks: Sequence[Task]) -> list[list[int] | str]:
    """The tasks' prompts through the chat template, without a part for thoughts if it has one."""
    conversations: list[dict[str, Any]] = []
    for task in tasks:
        tools = {"tools": list(task.tools)} if task.tools else {}
        conversations.append({"messages": list(task.messages), "enable_thinking": False} | tools)
    return render(folder, conversations)


def _problem(prompt: list[int] | str, room: int) -> str | None:
    """Why a task can't be asked, or None."""
    if isinstance(prompt, str):
        return f"the chat template refuses them ({prompt})"
    if not prompt:
        return "the tokenizer has none of their characters"
    return "they are longer than the model's context" if len(prompt) > room else None


def by_kind(
    kinds: Sequence[str], windows: Sequence[Windows], window_kl: Sequence[float]
) -> list[dict[str, Any]]:
    """KL divergence by kind of text, in the order in which kinds first occur.

    Args:
        kinds: of each window.
        windows: one for each task.
        window_kl: the mean of each window; fewer than windows after an interruption.

    Returns:
        For each kind `kind`, `windows`, `tokens` (positions that were compared), `kl` and `kl_se`
        (a standard error over windows, None where there is one).
    """
    figures = []
    for kind in dict.fromkeys(kinds[: len(window_kl)]):
        values = [
            np.full((1, window.per_window), mean)
            for name, window, mean in zip(kinds, windows, window_kl, strict=False)
            if name == kind
        ]
        kl, error, count = mean_and_se(values)
        tokens = sum(value.size for value in values)
        figures.append({"kind": kind, "windows": count, "tokens": tokens, "kl": kl, "kl_se": error})
    return figures


def kind_table(figures: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The figures of `by_kind` as columns and lines, for a terminal or a page."""
    columns = ["kind", "windows", "tokens", "KL, nats per token"]
    lines = [
        [f["kind"], str(f["windows"]), str(f["tokens"]), with_error(f["kl"], f["kl_se"])]
        for f in figures
    ]
    return columns, lines


def with_error(value: float, error: float | None) -> str:
    """A figure with its standard error, where there is one; `0.000045`, never `4.5e-05`."""
    return _decimal(f"{value:.4g}") + (
        f" ± {_decimal(f'{error:.2g}')}" if error is not None else ""
    )


def _decimal(rounded: str) -> str:
    """A number without an exponent: a page breaks a line within one."""
    return np.format_float_positional(float(rounded), trim="-")
