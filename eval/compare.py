"""`mint-mlx compare`: methods at the same bytes, scored against the same source, ranked by KL with error bars.

The peer sets the size: each peer is built at its own sizes near the budgets, and ours is built to those exact bytes.
What is built or scored is kept in the cache, so that a second run does only what is new.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import cache, pipeline
from ..allocate import allocate
from ..converters import checkpoint
from ..errors import MintError, UsageError, explain
from ..load import load_source
from ..objectives import OBJECTIVES
from ..pipeline import Job
from ..plan import Plan
from ..quant import QuantConfig
from ..report import Report, Silent
from ..units import Budget, parse_budget
from ..versions import versions
from . import peers, stats
from .evaluate import Settings, cut_text, device, get_reference, score_model
from .protocol import Windows
from .reference import SCHEMA, Reference, text_hash
from .text import read_text

UNIFORM = ("uniform-g32", "uniform-g64", "uniform-g128")
SAME = 0.003  # peers whose sizes differ by less than this share are met by one build of ours, at the smallest of them
FAR = 0.25  # a peer whose nearest size is further from the budget than this share isn't built
Row = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A checkpoint of one method in the cache, or the reason why there is none."""

    method: str
    kind: str
    text: bool
    about: str
    folder: Path | None
    bytes: int = 0
    seconds: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: rows in the order of the table (size, then KL), and what they were measured on."""

    source: str
    parameters: int
    rows: list[Row]
    text: str
    noise_floor: float


def known_methods() -> tuple[str, ...]:
    return (*OBJECTIVES, *UNIFORM, *peers.RECIPES, *peers.CALIBRATED)


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
        methods: names of `known_methods()`; by default all that this model and the texts given allow.
        given: MLX checkpoints (folders or Hub ids) to rank as well; each sets a size.
        baseline_text: a file that calibrated peers may see.
        settings: what is scored and how.
        speed: measure generation too.
        report: receives progress.

    Raises:
        MintError: a name, a size or a text is wrong. (What mlx-lm can't run becomes a row with the reason.)
    """
    settings, report = settings or Settings(), report or Silent()
    names = (
        list(methods)
        if methods is not None
        else [m for m in known_methods() if baseline_text or m not in peers.CALIBRATED]
    )
    for name in names:
        if name not in known_methods():
            raise UsageError(f"no method is called {name!r}: there are {', '.join(known_methods())}")
    sizes = [parse_budget(b) for b in budgets]
    if not sizes and not given:
        raise UsageError("give a --budget (several are allowed), or a checkpoint to meet with --with")
    text = read_text(baseline_text) if baseline_text is not None else None
    job = pipeline.prepare(model)
    pipeline.refuse_quantized(job)
    bench = _Bench(job, settings, report)
    made = [*bench.peers(names, [_limit(job, s) for s in sizes], text), *bench.given(given)]
    wanted = sorted({m.bytes for m in made if m.folder} | {_limit(job, s) for s in sizes})
    groups = _group(wanted)
    made += bench.ours([n for n in names if n in OBJECTIVES], groups)
    rows = [bench.row(m) | {"group": _nearest(groups, m.bytes)} for m in made]
    if speed:
        bench.add_speed(rows, made)
    _rank(rows)
    rows.sort(key=lambda r: (r["group"], r.get("kl") is None, r.get("kl") or 0, r["method"]))
    about = bench.reference.about
    return Comparison(job.source.name, job.inventory.parameters, rows, about.text, about.noise_floor)


def _limit(job: Job, budget: Budget) -> int:
    limit = budget.resolve(job.inventory.parameters)
    if limit is None:
        curves = pipeline.get_profile(job)
        return allocate(curves, budget, job.recipe).layout(job.inventory).total
    return limit


def _group(sizes: list[int]) -> list[int]:
    """Sizes that are nearly the same, as the smallest of each such set."""
    groups: list[int] = []
    for size in sizes:
        if not groups or size > groups[-1] * (1 + SAME):
            groups.append(size)
    return groups


def _nearest(groups: list[int], size: int) -> int:
    return min(groups, key=lambda g: abs(g - size)) if groups else size


class _Bench:
    """A source with its windows and reference, and the cache of what was made from it."""

    def __init__(self, job: Job, settings: Settings, report: Report) -> None:
        self.job, self.settings, self.report = job, settings, report
        name = f"{job.source.name.replace('/', '--')}-{job.source.fingerprint}"
        self.folder = cache.cache_dir() / "compare" / name
        parts, control = cut_text(job.source, settings, None, report)
        self.parts: list[Windows] = parts
        self.reference: Reference = get_reference(job.source, parts, control, settings, report)
        self.score_file = f"score{SCHEMA}-{text_hash(parts)}-{device()}.json"

    def peers(self, names: Sequence[str], budgets: Sequence[int], text: str | None) -> Iterator[Made]:
        """Every peer at its sizes near the budgets, each size once."""
        seen = set()
        digest = hashlib.blake2b((text or "").encode(), digest_size=4).hexdigest()
        for budget in budgets:
            for name in names:
                if name in OBJECTIVES:
                    continue
                for peer in peers.make_peers(name, self.job.source, self.job.inventory, budget, text):
                    if (peer.name, peer.about) not in seen:
                        seen.add((peer.name, peer.about))
                        key = digest if peer.text else ""
                        yield self._build(
                            peer.name, "peer", peer.text, peer.about, key, peer.build, budget, foreign=True
                        )

    def given(self, repos: Sequence[str]) -> Iterator[Made]:
        """Checkpoints that exist already."""
        for repo in repos:
            source = load_source(repo)
            yield Made(source.name, "given", False, "as given", source.path, source.weight_bytes)

    def ours(self, objectives: Sequence[str], sizes: Sequence[int]) -> Iterator[Made]:
        """Our checkpoints with each objective at each size."""
        curves = pipeline.get_profile(self.job, self.report)
        for size in sizes:
            for objective in objectives:
                try:
                    plan = allocate(curves, parse_budget(f"{size}B"), self.job.recipe, objective)
                except MintError as error:
                    yield Made(objective, "ours", False, f"{size} B", None, size, reason=str(error))
                    continue
                key = json.dumps({path: str(c) for path, c in plan.choice.items()})
                about = plan.quantizer
                yield self._build(objective, "ours", False, about, key, self._writer(plan), size)

    def _writer(self, plan: Plan) -> Callable[[Path], None]:
        source, inventory = self.job.source, self.job.inventory
        return lambda out: void(checkpoint.write(source, inventory, plan, out, force=True))

    def _build(
        self,
        method: str,
        kind: str,
        text: bool,
        about: str,
        key: str,
        build: Callable[[Path], None],
        size: int,
        foreign: bool = False,
    ) -> Made:
        """Build a checkpoint, or find it in the cache. What fails in mlx-lm's code is a row of its own, not an end."""
        digest = hashlib.blake2b(f"{method}|{about}|{key}|{versions()}".encode(), digest_size=6).hexdigest()
        home = self.folder / f"{method}-{digest}"
        folder, note = home / "checkpoint", read_json(home / "made.json")
        if note is None or not folder.is_dir():
            self.report.stage(f"build {method} ({about})")
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            started = time.monotonic()
            try:
                build(home / "unfinished")
            except MintError as error:
                return Made(method, kind, text, about, None, size, reason=str(error))
            except Exception as error:
                if not foreign or explain(error):  # a fault of ours, or one of disk and network
                    raise
                return Made(
                    method, kind, text, about, None, reason=f"mlx-lm fails here: {type(error).__name__}: {error}"
                )
            (home / "unfinished").rename(folder)
            note = {"seconds": time.monotonic() - started}
            (home / "made.json").write_text(json.dumps(note), encoding="utf-8")
        return Made(method, kind, text, about, folder, peers.stored_bytes(folder), note["seconds"])

    def row(self, made: Made) -> Row:
        """A checkpoint's figures: from the cache, else measured and kept."""
        row: Row = {
            "method": made.method,
            "kind": made.kind,
            "sees_text": made.text,
            "about": made.about,
            "bytes": made.bytes,
            "bits_per_weight": made.bytes * 8 / self.job.inventory.parameters,
            "seconds": made.seconds,
        }
        if made.folder is None:
            return row | {"reason": made.reason}
        home = (
            made.folder.parent
            if made.kind != "given"
            else self.folder / f"given-{load_source(str(made.folder)).fingerprint}"
        )
        figures = read_json(home / self.score_file)
        if figures is None:
            source = replace(load_source(str(made.folder)), name=made.method)
            figures = score_model(source, self.parts, self.reference, self.settings, self.report)
            if figures["interrupted"]:
                raise KeyboardInterrupt
            home.mkdir(parents=True, exist_ok=True)
            (home / self.score_file).write_text(json.dumps(figures), encoding="utf-8")
        skip = ("model", "text", "protocol", "length", "source", "seconds", "bytes", "bits_per_weight", "interrupted")
        return row | {"eval_seconds": figures["seconds"]} | {k: v for k, v in figures.items() if k not in skip}

    def add_speed(self, rows: list[Row], made: Sequence[Made]) -> None:
        """Measure generation of every row, and its ratio to uniform 4bit-g64 in the same run."""
        config = QuantConfig(4, 64)
        sizes = peers.uniform_sizes(self.job.inventory, (4,), (64,))
        base = next(
            p
            for p in peers.make_peers("uniform-g64", self.job.source, self.job.inventory, sizes[config], None)
            if p.about == str(config)
        )
        reference = self._speed(
            self._build(base.name, "peer", False, base.about, "", base.build, sizes[config], foreign=True)
        )
        for row, entry in zip(rows, made, strict=True):
            if entry.folder is not None:
                found = self._speed(entry)
                row |= found | {
                    "decode_ratio": found["decode_tokens_per_second"] / reference["decode_tokens_per_second"]
                }

    def _speed(self, made: Made) -> dict[str, float]:
        from .speed import speed

        assert made.folder is not None
        self.report.stage(f"speed of {made.method} ({made.about})")
        return speed(made.folder)


def void(_: object) -> None:
    """Drop a value."""


def read_json(path: Path) -> Any:
    """A cached JSON file, or None where there is none or it was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _rank(rows: list[Row]) -> None:
    """Within each size: ranks by KL, and each row's paired difference in KL from the best peer of that size."""
    for group in {row["group"] for row in rows}:
        scored = sorted((r for r in rows if r["group"] == group and "kl" in r), key=lambda r: r["kl"])
        best = next((r for r in scored if r["kind"] != "ours"), None)
        for rank, row in enumerate(scored, start=1):
            row["rank"] = rank
            if best is not None:
                row["best_peer"] = best["method"]
                difference, interval = stats.paired(row["window_kl"], best["window_kl"])
                row["kl_difference"], row["kl_difference_ci95"] = difference, interval
