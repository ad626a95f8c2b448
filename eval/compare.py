"""`mint-mlx compare`: methods at the same bytes, scored against the same source, ranked by KL with
error bars.

The peer sets the size: each peer is built at its own sizes near the budgets, and ours is built to
at most those bytes (of peers within SAME of each other to the smallest's).
What is built or scored is kept in the cache, so that a second run does only what is new.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..allocation.allocate import allocate
from ..allocation.plan import Plan
from ..allocation.search_space import SearchSpace
from ..base.errors import MintError, UsageError, explain
from ..base.files import exclusive, read_json, write_text
from ..base.quant_config import QuantConfig
from ..base.report import Report, Silent
from ..base.units import Budget, both, parse_budget
from ..base.versions import versions
from ..checkpoint.source import Source, load_source
from ..checkpoint.tokenizer import load_tokenizer
from ..converters.output import write
from ..converters.quantizers.memory_estimate import check_room
from ..converters.quantizers.registry import find_quantizer, needs_inputs
from ..jobs import measurements
from ..jobs.model import Job, prepare
from ..measure import cache
from ..measure.sensitivity import Sensitivity
from ..rules.efforts import EFFORTS, Effort
from ..rules.objectives import needs_sensitivity
from . import peers, stats
from .evaluate import Settings, check_same_tokenizer, cut_text, device, get_reference, score_model
from .reference import SCHEMA, text_hash
from .text import read_text

UNIFORM = ("uniform-g32", "uniform-g64", "uniform-g128")
OURS = {  # the levels of `convert --effort`, and two objectives
    **EFFORTS,
    "nmse": Effort("weights only", "nmse", "rtn"),
    "mint": Effort("weights only", "mint", "rtn"),
}
PUBLISHED = (
    "mint",
)  # built by us at every size, but somebody else's method: a peer like the others
NAMES = {"nmse": "mint-mlx (nmse)", "mint": "MINT as published"}  # in tables and pictures
# peers whose sizes differ by less than this share are met by one build of ours, at the smallest of
# them
SAME = 0.003
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A checkpoint to build, or the reason why it can't be.

    Attributes:
        method: as in the table.
        kind: `ours`, `peer` or `given`.
        text: whether the method sees the baseline text.
        about: its parameters, for the table and the cache.
        size: bytes aimed at.
        key: what else decides the result, for the cache.
        build: writes it into a folder; None for one that exists already, or can't be built.
        foreign: whether mlx-lm's code does it, whose failures are rows of the table.
        folder: where it exists already.
        reason: why it can't be built.
    """

    method: str
    kind: str
    text: bool
    about: str
    size: int
    key: str = ""
    build: Callable[[Path], Any] | None = None
    foreign: bool = False
    folder: Path | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Made:
    """A checkpoint that was built, or why it wasn't. `home` is its folder in the cache."""

    task: Task
    folder: Path | None
    home: Path
    bytes: int
    seconds: float
    reason: str | None = None

    @property
    def group_size(self) -> int:
        """The size by which its group is found: ours is built for a group's, and may be a little
        smaller.
        """
        return self.task.size if self.task.method in OURS else self.bytes


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: rows in the order of the table (size, then KL), and what they were
    measured on.
    """

    source: str
    parameters: int
    rows: list[Row]
    text: str
    noise_floor: float | None


def known_methods() -> tuple[str, ...]:
    """All names that `--methods` takes."""
    return (*OURS, *UNIFORM, *peers.RECIPES, *peers.CALIBRATED)


def check_methods(names: Sequence[str] | None, baseline_text: str | None) -> list[str]:
    """The methods to run, each once; all by default (those that lack a text become rows that say
    so).

    Raises:
        UsageError: a name is unknown, or one that was asked for needs a text.
    """
    if names is None:
        return list(known_methods())
    chosen = list(dict.fromkeys(name.strip() for name in names))
    for name in chosen:
        if name not in known_methods():
            raise UsageError(
                f"no method is called {name!r}: there are {', '.join(known_methods())}"
            )
        if name in peers.CALIBRATED and baseline_text is None:
            raise UsageError(
                f"{name} calibrates on a text: give one with --baseline-text (not the one that is "
                "scored)"
            )
    return chosen


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
        given: MLX checkpoints (folders or Hub ids) to rank as well; each sets a size.
        baseline_text: a file that calibrated peers may see.
        settings: what is scored and how.
        speed: measure generation too.
        report: receives progress.

    Raises:
        MintError: a name, a size or a text is wrong. (What mlx-lm can't run becomes a row with the
            reason.)
    """
    settings, report = settings or Settings(), report or Silent()
    names = check_methods(methods, baseline_text)
    sizes = [parse_budget(b) for b in budgets]
    if not sizes and not given:
        raise UsageError(
            "give a --budget (several are allowed), or a checkpoint to meet with --with"
        )
    text = baseline(baseline_text, settings) if baseline_text is not None else None
    existing = [load_source(repo) for repo in dict.fromkeys(given)]
    job = prepare(model)
    peers.refuse_quantized(job)
    bench = _Bench(job, settings, report)
    limits = [_limit(job, size) for size in sizes]
    made = [
        bench.build(task) for task in (*bench.peers(names, limits, text), *bench.given(existing))
    ]
    groups = _group(sorted({m.bytes for m in made if m.folder} | set(limits)))
    made += [bench.build(task) for task in bench.ours([n for n in names if n in OURS], groups)]
    rows = [bench.row(m) | {"group": _nearest(groups, m.group_size)} for m in made]
    if speed:
        bench.add_speed(rows, made)
    _rank(rows)
    rows.sort(key=lambda r: (r["group"], r.get("kl") is None, r.get("kl") or 0, r["method"]))
    about = bench.reference.about
    return Comparison(
        job.source.name, job.inventory.parameters, rows, about.text, about.noise_floor
    )


def baseline(path: str, settings: Settings) -> str:
    """The text that calibrated peers may see.

    Raises:
        MintError: it is the one that is scored, or holds parts of it.
    """
    text = read_text(path)
    scored = "" if settings.chat else read_text(settings.text)
    if scored and max(_shared(text, scored), _shared(scored, text)) > 0.01:
        raise MintError(
            f"{path} holds the text that is scored, on which calibrating proves nothing: give "
            "another one"
        )
    return text


def _shared(text: str, other: str, pieces: int = 300, length: int = 80) -> float:
    """The share of a text's pieces (so many, evenly spread, of so many characters) that another one
    holds as well.
    """
    starts = range(0, max(1, len(text) - length), max(1, len(text) // pieces))
    return sum(text[start : start + length] in other for start in starts) / len(starts)


def _limit(job: Job, budget: Budget) -> int:
    limit = budget.resolve(job.inventory.parameters)
    if limit is None:
        curves = measurements.get_profile(job)
        return (
            allocate(curves, budget, SearchSpace(job.inventory, job.recipe))
            .layout(job.inventory)
            .total
        )
    return limit


def _group(sizes: list[int]) -> list[int]:
    """Sizes that are nearly the same, as the smallest of each such set."""
    groups: list[int] = []
    for size in sizes:
        if not groups or size > groups[-1] * (1 + SAME):
            groups.append(size)
    return groups


def _nearest(groups: list[int], size: int) -> int:
    """The group that a size was put in: the largest that isn't above it, or the first."""
    return max((g for g in groups if g <= size), default=groups[0] if groups else size)


class _Bench:
    """A source with its windows and reference, and the cache of what was made from it."""

    def __init__(self, job: Job, settings: Settings, report: Report) -> None:
        self.job, self.settings, self.report = job, settings, report
        source = job.source
        self.folder = (
            cache.cache_dir() / "compare" / f"{cache.file_name(source.name)}-{source.fingerprint}"
        )
        self.parts, control = cut_text(source, settings, report)
        self.reference = get_reference(source, self.parts, control, settings, report)
        self.score_file = f"score{SCHEMA}-{text_hash(self.parts)}-{device()}.json"

    def peers(
        self, names: Sequence[str], budgets: Sequence[int], text: str | None
    ) -> Iterator[Task]:
        """Every peer at its sizes near the budgets, each size once."""
        seen = set()
        digest = hashlib.blake2b((text or "").encode(), digest_size=4).hexdigest()
        for budget in budgets:
            for name in names:
                if name in OURS:
                    continue
                if name in peers.CALIBRATED and text is None:
                    reason = "calibrates on a text: give one with --baseline-text"
                    yield Task(name, "peer", True, "-", budget, reason=reason)
                    continue
                found = peers.make_peers(name, self.job.source, self.job.inventory, budget, text)
                if not found:
                    self.report.note(f"{name} has no size near {both(budget)}")
                for p in found:
                    if (p.name, p.about) not in seen:
                        seen.add((p.name, p.about))
                        key = digest if p.text else ""
                        yield Task(
                            p.name, "peer", p.text, p.about, budget, key, p.build, foreign=True
                        )

    def given(self, sources: Sequence[Source]) -> Iterator[Task]:
        """Checkpoints that exist already."""
        for source in sources:
            key = f"{source.fingerprint} {source.stamp}"
            yield Task(
                source.name,
                "given",
                False,
                "as given",
                source.weight_bytes,
                key,
                folder=source.path,
            )

    def ours(self, names: Sequence[str], sizes: Sequence[int]) -> Iterator[Task]:
        """Our checkpoints by each method at each size."""
        if not names:
            return
        own: dict[str, Sensitivity | None] = {}
        why: dict[str, str] = {}
        for name in names:
            try:
                own[name] = self._own(OURS[name])
            except MintError as error:
                why[name] = str(error)
        curves = measurements.get_profile(self.job, self.report)
        for size in sizes:
            for name in names:
                kind = "peer" if name in PUBLISHED else "ours"
                if name in why:
                    yield Task(name, kind, False, "-", size, reason=why[name])
                    continue
                objective, quantizer, mine = OURS[name].objective, OURS[name].quantizer, own[name]
                try:
                    plan = allocate(
                        curves,
                        parse_budget(f"{size}B"),
                        SearchSpace(self.job.inventory, self.job.recipe),
                        objective,
                        mine,
                    )
                    plan = replace(
                        plan, quantizer=quantizer, effort=name if name in EFFORTS else plan.effort
                    )
                except MintError as error:
                    yield Task(name, kind, False, "-", size, reason=str(error))
                    continue
                key = json.dumps({path: str(c) for path, c in plan.choice.items()})
                inputs = mine if needs_inputs(quantizer) else None
                if inputs is not None:
                    key += write.digest(inputs)
                refine = OURS[name].refine and inputs is not None
                yield Task(
                    name,
                    kind,
                    False,
                    plan.quantizer,
                    size,
                    key,
                    partial(self._write, plan, inputs, refine),
                )

    def _own(self, level: Effort) -> Sensitivity | None:
        """The model's own text and sensitivity, where a level looks at them.

        Raises:
            MintError: it would take too much memory, or the model can't be walked through.
        """
        if not needs_sensitivity(level.objective) and not needs_inputs(level.quantizer):
            return None
        needed = find_quantizer(level.quantizer).memory(self.job.inventory, level.tokens, True)
        check_room(needed, "leave it out of --methods, or take a larger machine")
        found = measurements.get_sensitivity(self.job, self.report, level.tokens)
        if found is None:
            raise MintError(
                "no sensitivity can be measured of this model: `convert` makes the same of it as "
                "fast"
            )
        return found

    def _write(self, plan: Plan, sensitivity: Sensitivity | None, refine: bool, out: Path) -> None:
        from ..converters.quantizers.distil import NO_ROOM, can_refine

        source, inventory = self.job.source, self.job.inventory
        if refine and not can_refine(inventory, plan.choice):
            self.report.note(NO_ROOM)
            refine = False
        write.write(
            write.Conversion(
                source,
                inventory,
                plan,
                out,
                force=True,
                report=self.report,
                sensitivity=sensitivity,
                refine=refine,
            )
        )

    def build(self, task: Task) -> Made:
        """Build a checkpoint, or find it in the cache. What fails in mlx-lm's code is a row of its
        own, not an end.
        """
        digest = hashlib.blake2b(
            f"{task.method}|{task.about}|{task.key}|{versions()}".encode(), digest_size=6
        )
        home = self.folder / f"{cache.file_name(task.method)}-{digest.hexdigest()}"
        if task.folder is not None:
            return Made(task, task.folder, home, task.size, 0.0)
        if task.build is None:
            return Made(task, None, home, task.size, 0.0, task.reason)
        folder = home / "checkpoint"
        with exclusive(
            home, lambda: self.report.stage(f"wait for another run that builds {task.method}")
        ):
            note = read_json(home / "made.json")
            if (
                note is None and folder.is_dir()
            ):  # whole since it has this name; the note was not written any more
                note = {"seconds": 0.0, "reason": None}
            if note is None or not (folder.is_dir() or note.get("reason")):
                note = self._build_new(task, task.build, home)
        if note.get("reason"):
            return Made(task, None, home, task.size, note["seconds"], note["reason"])
        return Made(task, folder, home, peers.stored_bytes(folder), note["seconds"])

    def _build_new(self, task: Task, build: Callable[[Path], Any], home: Path) -> dict[str, Any]:
        self.report.stage(f"build {task.method} ({task.about})")
        if task.foreign:  # ours goes on from what an interrupted run left
            shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        started, reason, lasts = time.monotonic(), None, True
        try:
            build(home / "unfinished")
            (home / "unfinished").rename(home / "checkpoint")
        except MintError as error:
            reason, lasts = str(error), False
        except Exception as error:
            if not task.foreign or explain(error):  # a fault of ours, or one of disk and network
                raise
            reason = f"mlx-lm fails here: {type(error).__name__}: {error}"
            lasts = not isinstance(
                error, (MemoryError, RuntimeError)
            )  # too little memory may be enough next time
        if reason is not None:
            shutil.rmtree(home / "unfinished", ignore_errors=True)
        note = {"seconds": time.monotonic() - started, "reason": reason}
        if lasts:
            write_text(home / "made.json", json.dumps(note))
        return note

    def row(self, made: Made) -> Row:
        """A checkpoint's figures: from the cache, else measured and kept. One that can't be scored
        says why.
        """
        task = made.task
        row: Row = {
            "method": task.method,
            "kind": task.kind,
            "sees_text": task.text,
            "about": task.about,
            "bytes": made.bytes,
            "bits_per_weight": made.bytes * 8 / self.job.inventory.parameters,
            "seconds": made.seconds,
        }
        if made.folder is None:
            return row | {"reason": made.reason}
        figures = read_json(made.home / self.score_file)
        if figures is None:
            try:
                figures = self._score(made.folder, task.method)
            except MintError as error:
                return row | {"reason": str(error)}
            write_text(made.home / self.score_file, json.dumps(figures))
        skip = (
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
        return (
            row
            | {"eval_seconds": figures["seconds"]}
            | {k: v for k, v in figures.items() if k not in skip}
        )

    def _score(self, folder: Path, name: str) -> dict[str, Any]:
        source = replace(load_source(str(folder)), name=name)
        about = self.reference.about
        check_same_tokenizer(about.source, about.tokenizer, load_tokenizer(folder))
        figures = score_model(source, self.parts, self.reference, self.settings, self.report)
        if figures["interrupted"]:
            raise KeyboardInterrupt
        return figures

    def add_speed(self, rows: list[Row], made: Sequence[Made]) -> None:
        """Measure generation of every row, and its ratio to uniform 4bit-g64 in the same run."""
        config = QuantConfig(4, 64)
        size = peers.uniform_sizes(self.job.inventory, (4,), (64,))[config]
        tasks = [t for t in self.peers(["uniform-g64"], [size], None) if t.about == str(config)]
        base = self.build(tasks[0])
        if base.folder is None:
            self.report.note(
                f"no speeds: uniform 4bit-g64, their measure, was not built ({base.reason})"
            )
            return
        reference = self._speed(base.folder, base.task)
        for row, entry in zip(rows, made, strict=True):
            if entry.folder is not None and "kl" in row:
                row |= self._speed(entry.folder, entry.task)
                row["decode_ratio"] = (
                    row["decode_tokens_per_second"] / reference["decode_tokens_per_second"]
                )

    def _speed(self, folder: Path, task: Task) -> dict[str, float]:
        from .speed import speed

        self.report.stage(f"speed of {task.method} ({task.about})")
        return speed(folder)


def _rank(rows: list[Row]) -> None:
    """Within each size: ranks by KL, and each row's paired difference in KL from the best peer of
    that size.
    """
    for group in {row["group"] for row in rows}:
        scored = sorted(
            (r for r in rows if r["group"] == group and "kl" in r), key=lambda r: r["kl"]
        )
        best = next((r for r in scored if r["kind"] != "ours"), None)
        for rank, row in enumerate(scored, start=1):
            row["rank"] = rank
            if best is not None:
                row["best_peer"] = best["method"]
                difference, interval = stats.paired(row["window_kl"], best["window_kl"])
                row["kl_difference"], row["kl_difference_ci95"] = difference, interval
