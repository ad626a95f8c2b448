"""`mint-mlx compare`: methods at the same bytes, scored against the same source, ranked by KL.

The peer sets the size: each peer is built at its own sizes near the budgets, and ours is built to
at most those bytes (of peers within SAME of each other to the smallest's). What is built or scored
stays in the cache, so that a second run does only what is new.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..allocation.allocate import allocate
from ..allocation.search_space import SearchSpace
from ..base import schema
from ..base.checksum import Damaged, if_sound, read_checked, with_checksum
from ..base.errors import MintError, UsageError
from ..base.files import write_text
from ..base.quant_config import QuantConfig
from ..base.report import Report, Silent
from ..base.units import Budget, parse_budget
from ..checkpoint.source import check_unchanged, load_source
from ..checkpoint.tokenizer import load_tokenizer
from ..jobs import measurements
from ..jobs.model import Job, check_same_model, prepare
from ..measure import cache
from . import peers, stats
from .build import Built, Task, build
from .evaluate import cut_text, score_model
from .gguf_file import GGUF, check_gguf
from .make_reference import device, get_reference
from .methods import OURS, check_methods, gguf_tasks, given_tasks, our_tasks, peer_tasks
from .protocol import Windows
from .reference import SCHEMA, Reference, text_hash
from .settings import Settings
from .text import check_same_tokenizer, read_text

SAME = 0.003  # sizes that differ by less than this share are one group, of the smallest one's size
NOT_IN_ROWS = (  # figures of an evaluation that a row has under another name, or not at all
    "model",
    "text",
    "protocol",
    "length",
    "source",
    "seconds",
    "bytes",
    "bits_per_weight",
    "interrupted",
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        source: the source's name.
        parameters: of the source.
        rows: in the order of the table: by size, then by KL.
        text: what was scored.
        noise_floor: the KL of the source against itself, or None.
    """

    source: str
    parameters: int
    rows: list[Row]
    text: str
    noise_floor: float | None


@dataclass(frozen=True)
class Bench:
    """What every checkpoint of a comparison is scored on.

    Attributes:
        job: the source.
        text: the windows, in the source's tokens.
        reference: its predictions on them.
        settings: how they were cut.
        report: receives progress.
    """

    job: Job
    text: list[Windows]
    reference: Reference
    settings: Settings
    report: Report

    @property
    def cache_folder(self) -> Path:
        """The cache of all checkpoints that are made from this source."""
        source = self.job.source
        name = f"{cache.file_name(source.name)}-{source.fingerprint}"
        return cache.cache_dir() / "compare" / name

    def build(self, task: Task) -> Built:
        """Build a checkpoint, or find it in the cache.

        Raises:
            MintError: the source has changed since it was opened; what was made of it isn't kept.
        """
        source = self.job.source
        # What is built brings the source's tokenizer along.
        task = replace(task, key=f"{task.key}|{self.reference.about.tokenizer}")
        if source.sampled:
            task = replace(task, key=f"{task.key}|{source.stamp}")

        if write := task.build:

            def write_checked(folder: Path) -> None:
                write(folder)
                check_unchanged(source)

            task = replace(task, build=write_checked)
        built = build(task, self.cache_folder, self.report)
        check_unchanged(source)
        return built


@cache.using("compare")
def compare(
    model: str,
    budgets: Sequence[str],
    methods: Sequence[str] | None = None,
    given: Sequence[str] = (),
    baseline_text: str | None = None,
    settings: Settings | None = None,
    speed: bool = True,
    report: Report | None = None,
) -> Comparison:
    """Build and score every method at every size.

    Args:
        model: the unquantized source.
        budgets: sizes, as for `convert`.
        methods: names of `known_methods()`; all by default.
        given: MLX checkpoints (folders or Hub ids) and GGUF files of the source to rank as well;
            each sets a size.
        baseline_text: a file that calibrated peers may see.
        settings: what is scored and how.
        speed: measure generation too.
        report: receives progress.

    Raises:
        MintError: a name, a size or a text is wrong. (What mlx-lm can't run becomes a row with the
            reason.)
    """
    settings = settings or Settings()
    report = report or Silent()

    # All that can be wrong with the call is refused before the source runs.
    names = check_methods(methods, baseline_text)
    sizes = [parse_budget(budget) for budget in budgets]
    if not sizes and not given:
        raise UsageError("give a size with --budget, or a checkpoint to compare with --with")
    calibration = baseline(baseline_text, settings) if baseline_text is not None else None
    files = list({Path(n).resolve(): Path(n) for n in given if n.endswith(GGUF)}.values())
    others = [load_source(repo) for repo in dict.fromkeys(given) if not repo.endswith(GGUF)]
    existing = list({other.path.resolve(): other for other in others}.values())
    job = prepare(model)
    check_gguf(job.source, files)
    for other in existing:
        check_same_model(other, job.source, report)
    peers.refuse_quantized(job)

    text, control = cut_text(job.source, settings, report)
    reference = get_reference(job.source, text, control, settings, report)
    bench = Bench(job, text, reference, settings, report)

    # Peers and given checkpoints have sizes of their own; ours are built to meet them.
    limits = [_limit(job, size) for size in sizes]
    unbuilt = [name for name in names if name not in OURS] if methods and not limits else []
    if unbuilt:
        report.note(f"{', '.join(unbuilt)}: built near sizes of --budget only, and none is given")
    tasks = [
        *peer_tasks(job, names, limits, calibration, report),
        *gguf_tasks(job.source, files),
        *given_tasks(existing),
    ]
    built = [bench.build(task) for task in tasks]
    groups = _group(sorted({b.bytes for b in built if b.folder} | set(limits)))
    ours = [name for name in names if name in OURS]
    built += [bench.build(task) for task in our_tasks(job, ours, groups, report)]

    rows = [_row(bench, b) | {"group": _nearest(groups, _group_size(b))} for b in built]
    if speed:
        _add_speed(bench, rows, built)
    _rank(rows)
    rows.sort(key=lambda r: (r["group"], r.get("kl") is None, r.get("kl") or 0, r["method"]))
    about = reference.about
    return Comparison(
        job.source.name, job.inventory.parameters, rows, about.text, about.noise_floor
    )


# Texts


def baseline(path: str, settings: Settings) -> str:
    """The text that calibrated peers may see.

    Raises:
        MintError: it is the one that is scored, or holds parts of it.
    """
    text = read_text(path)
    scored = "" if settings.chat else read_text(settings.text)
    if scored and max(_shared(text, scored), _shared(scored, text)) > 0.01:
        raise MintError(
            f"{path} holds the text that is scored, so that a score after calibrating on it proves "
            "nothing: give another one with --baseline-text"
        )
    return text


def _shared(text: str, other: str, pieces: int = 300, length: int = 80) -> float:
    """The share of a text's pieces that another text holds as well.

    Args:
        text: where pieces are cut from, evenly spread.
        other: where they are looked for.
        pieces: how many.
        length: characters in each.
    """
    starts = range(0, max(1, len(text) - length), max(1, len(text) // pieces))
    return sum(text[start : start + length] in other for start in starts) / len(starts)


# Sizes


def _limit(job: Job, budget: Budget) -> int:
    """A budget in bytes; `smallest` and the like need the model's profile."""
    limit = budget.resolve(job.inventory.parameters)
    if limit is None:
        space = SearchSpace(job.inventory, job.recipe)
        plan = allocate(measurements.get_profile(job), budget, space)
        return plan.layout(job.inventory).total
    return limit


def _group(sizes: list[int]) -> list[int]:
    """Sorted sizes without those that are nearly the same as a smaller one."""
    groups: list[int] = []
    for size in sizes:
        if not groups or size > groups[-1] * (1 + SAME):
            groups.append(size)
    return groups


def _group_size(built: Built) -> int:
    """The size by which a checkpoint's group is found.

    Ours is built for a group's size, and may be a little smaller.
    """
    return built.task.size if built.task.method in OURS else built.bytes


def _nearest(groups: list[int], size: int) -> int:
    """The group that a size belongs to: the largest that isn't above it, or the first."""
    return max((g for g in groups if g <= size), default=groups[0] if groups else size)


# Rows


def _row(bench: Bench, built: Built) -> Row:
    """A checkpoint's row: from the cache, else scored now; one that can't be scored says why."""
    task = built.task
    row: Row = {
        "method": task.method,
        "kind": task.kind,
        "sees_text": task.sees_text,
        "about": task.about,
        "bytes": built.bytes,
        "bits_per_weight": built.bytes * 8 / bench.job.inventory.parameters,
        "seconds": built.seconds,
    }
    if built.folder is None:
        return row | {"reason": built.reason}

    path = built.cache_folder / f"score{SCHEMA}-{text_hash(bench.text)}-{device()}.json"
    figures = if_sound(path, _read_figures)
    if figures is None:
        try:
            figures = _score(bench, built.folder, task.method)
        except MintError as error:
            return row | {"reason": str(error)}
        write_text(path, with_checksum(json.dumps(figures)))

    row["eval_seconds"] = figures["seconds"]
    return row | {key: value for key, value in figures.items() if key not in NOT_IN_ROWS}


def _read_figures(path: Path) -> dict[str, Any]:
    """The stored figures of a checkpoint.

    Raises:
        Damaged: they aren't what `score_model` gives.
    """
    figures: dict[str, Any] = read_checked(path, old='{"model": ')
    try:
        numbers = [figures["seconds"], figures["kl"], figures["perplexity"]]
        for value in [*numbers, *figures["window_nll"], *figures["window_kl"]]:
            schema.number(value)
    except (KeyError, TypeError, ValueError):
        raise Damaged(f"{path} is damaged") from None
    return figures


def _score(bench: Bench, folder: Path, name: str) -> dict[str, Any]:
    """The figures of a checkpoint.

    Raises:
        MintError: it isn't made from this source, or its weights are damaged.
        KeyboardInterrupt: also where some windows were finished, since rows are compared window by
            window.
    """
    about = bench.reference.about
    check_same_tokenizer(about.source, about.tokenizer, load_tokenizer(folder))
    source = replace(load_source(str(folder)), name=name)
    figures = score_model(source, bench.text, bench.reference, bench.settings, bench.report)
    if figures["interrupted"]:
        raise KeyboardInterrupt
    return figures


def _add_speed(bench: Bench, rows: list[Row], built: Sequence[Built]) -> None:
    """Measure generation of every row, and its ratio to uniform 4bit-g64 in the same run.

    That one is measured before and after all others: where it differs from itself no ratio is told.
    """
    from .speed import UNSTEADY, decode_ratios

    config = QuantConfig(4, 64)
    job = bench.job
    size = peers.uniform_sizes(job.inventory, (4,), (64,))[config]
    tasks = peer_tasks(job, ["uniform-g64"], [size], None, bench.report)
    unit = bench.build(next(task for task in tasks if task.about == str(config)))
    if unit.folder is None:
        bench.report.note(
            f"no speeds: uniform 4bit-g64, to which they are compared, was not built "
            f"({unit.reason})"
        )
        return

    before = _speed(bench, unit.task, unit.folder)["decode_tokens_per_second"]
    measured = [
        (row, _speed(bench, entry.task, entry.folder))
        for row, entry in zip(rows, built, strict=True)
        if entry.folder is not None and "kl" in row and not entry.unpacked
    ]
    after = _speed(bench, unit.task, unit.folder)["decode_tokens_per_second"]
    for row, figures in measured:
        row |= figures | (decode_ratios(figures, before, after) or {})
    if measured and "decode_ratio" not in measured[0][0]:
        bench.report.note(
            f"no speeds: uniform 4bit-g64 decoded {before:.3g} tokens/s at first and {after:.3g} "
            f"at the end, more than {UNSTEADY:.0%} apart: close other programs and compare again"
        )


def _speed(bench: Bench, task: Task, folder: Path) -> dict[str, float]:
    from .speed import speed

    bench.report.stage(f"speed of {task.method} ({task.about})")
    return speed(folder)


def _rank(rows: list[Row]) -> None:
    """Add ranks by KL within each size, and the difference from the best peer of that size.

    Differences in KL are paired by windows.
    """
    for group in {row["group"] for row in rows}:
        of_group = [row for row in rows if row["group"] == group and "kl" in row]
        ranked = sorted(of_group, key=lambda row: (row["kl"], row["method"]))
        best = next((row for row in ranked if row["kind"] != "ours"), None)
        for rank, row in enumerate(ranked, start=1):
            row["rank"] = rank
            if best is not None:
                row["best_peer"] = best["method"]
                difference, interval = stats.paired(row["window_kl"], best["window_kl"])
                row["kl_difference"] = difference
                row["kl_difference_ci95"] = interval
