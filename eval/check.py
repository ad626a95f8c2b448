"""`mint-mlx check`: where a quantized model answers short tasks otherwise than its source.

Both answer greedily, so the same models give the same result. One model at a time is in memory.
Whether an answer is right is decided by comparing strings; how far the models are apart is told
by the first token that differs, and by the KL divergence on the source's own replies, which is
meaningful for models too that solve no task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.report import Report, Silent
from ..base.units import duration
from ..checkpoint.layers import list_layers
from ..checkpoint.source import Source, load_source, open_model
from ..checkpoint.tokenizer import load_tokenizer
from ..jobs.model import check_same_model
from ..runtime.replies import generate_replies
from ..runtime.runner import fits
from .check_time import check_seconds
from .evaluate import check_read_alike, score_model
from .kinds import REPLY, Asked, ask, by_kind, with_error
from .make_reference import get_reference
from .measured import MeasuredTable, keep_table
from .settings import Settings
from .tasks import is_right
from .text import check_same_tokenizer, tokenizer_key

SHOWN = 60  # characters of a reply in a table
TITLE = "Short tasks"
STAGES = ("replies of the source", "replies of the model", "source", "evaluate")


def check(model: str, source: str, report: Report | None = None) -> dict[str, Any]:
    """Put the bundled tasks to a checkpoint and to its source.

    Args:
        model: a folder or a Hub id.
        source: the model it was made from.
        report: receives progress.

    Returns:
        `model`, `source`, `form` (`chat` or `completion`), `kl`, `kl_se`, and as lists of tables
        `kinds` (figures of each kind of task) and `tasks` (each task with both replies).

    Raises:
        MintError: the checkpoint is of another model, the tokenizers differ, or a model can't be
            loaded or is too large.
        KeyboardInterrupt: also where some replies were scored.
    """
    report = report or Silent()
    candidate, origin = load_source(model), load_source(source)
    check_same_model(candidate, origin, report)
    check_read_alike(candidate)
    key = tokenizer_key(load_tokenizer(origin.path))
    check_same_tokenizer(origin.name, key, load_tokenizer(candidate.path))
    for each in (origin, candidate):
        _check_fits(each)
    seconds = check_seconds(list_layers(open_model(origin), origin.config))
    report.note(
        f"roughly {duration(seconds)} on this machine, less where the source was asked before"
    )
    report.stages(STAGES)

    asked = ask(origin, "check", report)
    report.stage(STAGES[1])
    replies = generate_replies(candidate.path, asked.prompts, REPLY, report.step)
    settings = Settings(kinds=True)
    nothing = [None] * len(asked.tasks)
    reference = get_reference(origin, asked.windows, nothing, settings, report)
    figures = score_model(candidate, asked.windows, reference, settings, report)
    if figures["interrupted"]:
        raise KeyboardInterrupt

    tasks = _tasks(asked, replies, load_tokenizer(candidate.path))
    divergences = by_kind(asked.kinds, asked.windows, figures["window_kl"])
    return {
        "model": candidate.name,
        "source": origin.name,
        "form": "chat" if asked.chat else "completion",
        "kl": figures["kl"],
        "kl_se": figures["kl_se"],
        "noise_floor": figures["noise_floor"],
        "kinds": [_kind(divergence, tasks) for divergence in divergences],
        "tasks": tasks,
    }


def _check_fits(source: Source) -> None:
    """Refuse a model that this machine can't hold whole.

    Raises:
        MintError: with its name.
    """
    if not fits(source.path):
        raise MintError(
            f"check generates replies with whole models in memory, and {source.name} is too large "
            "for this machine: `mint-mlx eval` runs it block by block"
        )


def _tasks(asked: Asked, replies: Sequence[list[int]], tokenizer: Any) -> list[dict[str, Any]]:
    """Each task with both replies, whether they are right, and where they part."""
    results = []
    for task, theirs, ours in zip(asked.tasks, asked.replies, replies, strict=True):
        source_reply, model_reply = tokenizer.decode(theirs), tokenizer.decode(ours)
        results.append(
            {
                "kind": task.kind,
                "question": task.question if asked.chat else task.base.rpartition("\n\n")[2],
                "answers": list(task.answers),
                "source_reply": source_reply,
                "model_reply": model_reply,
                "source_right": is_right(task, source_reply, asked.chat),
                "model_right": is_right(task, model_reply, asked.chat),
                "tokens": len(theirs),
                "first_difference": first_difference(theirs, ours),
            }
        )
    return results


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Index of the first token in which two replies differ; None where they are the same."""
    if first == second:
        return None
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _kind(divergence: dict[str, Any], tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a kind of task: answers that are right and the same, and the divergence."""
    of_kind = [task for task in tasks if task["kind"] == divergence["kind"]]
    return {
        "kind": divergence["kind"],
        "tasks": len(of_kind),
        "source_right": sum(task["source_right"] for task in of_kind),
        "model_right": sum(task["model_right"] for task in of_kind),
        "same": sum(task["first_difference"] is None for task in of_kind),
        "tokens": divergence["tokens"],
        "kl": divergence["kl"],
        "kl_se": divergence["kl_se"],
    }


def check_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The kinds of a result as columns and lines, all of them last, for a terminal or a page."""
    columns = ["kind", "tasks", "source right", "model right", "same reply", "KL, nats per token"]
    counts = ("tasks", "source_right", "model_right", "same")
    lines = [
        [kind["kind"], *(str(kind[key]) for key in counts), with_error(kind["kl"], kind["kl_se"])]
        for kind in result["kinds"]
    ]
    totals = [str(sum(kind[key] for kind in result["kinds"])) for key in counts]
    return columns, [*lines, ["all", *totals, with_error(result["kl"], result["kl_se"])]]


def keep_result(folder: Path, fingerprint: str, result: dict[str, Any]) -> None:
    """Keep the table of kinds in a checkpoint's folder, for its report.

    Args:
        folder: of a checkpoint of ours.
        fingerprint: of its weights.
        result: of `check`.
    """
    columns, lines = check_table(result)
    form = "its chat template" if result["form"] == "chat" else "texts to go on with"
    text = (
        f"Bundled tasks, put to the checkpoint and to {result['source']} through {form}: how many "
        "replies were right and how many were the same, and the KL on the source's own replies."
    )
    table = MeasuredTable(TITLE, text, tuple(columns), tuple(map(tuple, lines)))
    keep_table(folder, fingerprint, table)


def difference_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The tasks whose replies differ as columns and lines, those that were right before first."""
    columns = ["kind", "question", "source", "model", "differs from token"]
    differing = [task for task in result["tasks"] if task["first_difference"] is not None]
    differing.sort(key=lambda task: not (task["source_right"] and not task["model_right"]))
    lines = [
        [
            task["kind"],
            _short(task["question"]),
            _marked(task["source_reply"], task["source_right"]),
            _marked(task["model_reply"], task["model_right"]),
            str(task["first_difference"] + 1),
        ]
        for task in differing
    ]
    return columns, lines


def _marked(reply: str, right: bool) -> str:
    """A reply in short, with what was found of it."""
    return f"{'right' if right else 'wrong'}: {_short(reply)}"


def _short(text: str) -> str:
    """A text on one line, cut to its beginning."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
