"""How fast a model decodes on a machine, as its speed table predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..allocation.pace import BASELINE, Pace, predicted
from ..allocation.search_space import list_candidates, search_space
from ..allocation.uniform import comparable_choice
from ..base.one_line import one_line
from ..base.quant_config import QuantConfig
from ..base.report import Report
from ..base.targets import check_file
from ..checkpoint.layers import Inventory
from ..runtime.machine import CONTEXT, check_context
from ..runtime.speed_estimate import prompt_band
from ..runtime.speed_table import Speed, SpeedTable, model_key, prompt_speed
from ..runtime.speed_table_file import MARKER, save_table
from ..runtime.table_names import check_table_name, named_table
from .inspect import stored_plan
from .model import Job, prepare
from .speed_tables import UNIFORM, caches_of, get_table


@dataclass(frozen=True, repr=False)
class SpeedReport:
    """What `speed` tells of a model.

    Attributes:
        name: of the model.
        inventory: its layers.
        table: of the machine.
        context: tokens in the cache.
        speeds: predicted, by what they are of: uniform plans, and the checkpoint as it is stored.
        prompt: tokens per second at which layers alone read a prompt at uniform 4bit-g64; None
            where that wasn't timed.
    """

    name: str
    inventory: Inventory
    table: SpeedTable
    context: int
    speeds: Mapping[str, Speed]
    prompt: float | None

    @property
    def prompt_band(self) -> tuple[float, float] | None:
        """The lowest and the highest speed that an estimated one stands for."""
        if self.prompt is None or not self.table.estimated:
            return None
        return prompt_band(self.prompt)

    def __repr__(self) -> str:
        speeds = [f"{name}: {speed} tokens/s" for name, speed in self.speeds.items()]
        return one_line(self, self.name, self.table.machine, *speeds)


def speed(
    model: str,
    *,
    context: int = CONTEXT,
    table: str | None = None,
    save: str | Path | None = None,
    recipe: str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> SpeedReport:
    """Measure what a model's layers cost on this machine, and predict how fast it decodes.

    Args:
        model: a folder or a Hub id; its weights are not needed.
        context: tokens in the cache.
        table: a speed table's file or name, or a chip, in place of measuring.
        save: the file to write the table to, if any.
        recipe: a recipe's name or file, whose candidates are timed.
        force: replace an existing table.
        report: receives progress.

    Raises:
        MintError: the model, the table or the file is wrong.
    """
    check_context(context, None)
    check_table_name(table)
    target = Path(save) if save is not None else None
    if target is not None:
        check_file(target, MARKER, force)
    job = prepare(model, recipe, weights=False)
    options = list_candidates(search_space(job.inventory, job.recipe))
    if table is not None:
        times = named_table(table, job.inventory, job.source.name, caches_of(job, context))
    else:
        times = get_table(job, options, context, report)
    if target is not None:
        save_table(times, target)
    return _report(job, times, context)


def _report(job: Job, table: SpeedTable, context: int) -> SpeedReport:
    """The speeds that a table predicts for a model."""
    inventory = job.inventory
    pace = Pace(table, context)
    choices: dict[str, Mapping[str, QuantConfig]] = {
        f"uniform {config}": comparable_choice(inventory, config) for config in UNIFORM
    }
    stored = stored_plan(job).choice
    choices["as stored"] = stored
    speeds = {}
    for label, choice in choices.items():
        one = predicted(pace, inventory, choice)
        if one is not None:
            speeds[label] = one
    prompt = prompt_speed(table, inventory, comparable_choice(inventory, BASELINE))
    return SpeedReport(job.source.name, inventory, table, context, speeds, prompt)


def summary(report: SpeedReport) -> dict[str, Any]:
    """The same as one JSON object; seconds by kind, configuration and tokens at once."""
    layers = [
        {
            "kind": kind.kind,
            "shape": list(kind.shape),
            "active": kind.active,
            "seconds": {
                str(config): {str(batch): t.seconds for batch, t in batches.items()}
                for config, batches in times.items()
            },
        }
        for kind, times in sorted(report.table.layers.items())
    ]
    speeds = {
        label: {"tokens_per_second": speed.tokens_per_second, "band": list(speed.band)}
        for label, speed in report.speeds.items()
    }
    return {
        "source": report.name,
        "machine": report.table.machine,
        "estimated": report.table.estimated,
        "versions": dict(report.table.versions),
        "context": report.context,
        "rest_seconds": report.table.rests[model_key(report.inventory)].at(report.context),
        "predicted": speeds,
        "prompt_tokens_per_second": report.prompt,
        "prompt_band": report.prompt_band,
        "layers": layers,
    }
