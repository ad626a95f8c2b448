"""Holds predicted speeds against mlx-lm's own generation, six plans a model, on this machine.

    python eval/bench/speed_check.py table  MODEL --folder F   the speed table (two minutes)
    python eval/bench/speed_check.py plans  MODEL --folder F   six plans, written by `convert`
    python eval/bench/speed_check.py decode MODEL --folder F   mlx-lm generates from each
    python eval/bench/speed_check.py report --folder F         all models' results as Markdown
    python eval/bench/speed_check.py join   --folder F         all tables as one, for speed_tables/

The first and the third take time on a clock: run nothing beside them. The plans are three uniform
ones, an unlimited one of a size, one of the same bytes that is to decode a tenth faster, and a
larger one. The limited plan's loss is held against 50 random plans within the same
limits. A plan that mlx-lm can't run on this device (16-bit experts on a CPU) isn't made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np

from mint_mlx.base.blas import use_fast_blas

use_fast_blas()  # before anything imports mlx

from mint_mlx.allocation.allocate import allocate  # noqa: E402
from mint_mlx.allocation.pace import (  # noqa: E402
    BASELINE,
    Goal,
    Pace,
    predicted,
    seconds_for_layers,
    timed_candidates,
)
from mint_mlx.allocation.plan import Plan  # noqa: E402
from mint_mlx.allocation.plan_file import read_plan  # noqa: E402
from mint_mlx.allocation.search_space import list_candidates, search_space  # noqa: E402
from mint_mlx.allocation.uniform import comparable_choice  # noqa: E402
from mint_mlx.base.files import PLAN_FILE  # noqa: E402
from mint_mlx.base.quant_config import QuantConfig, mx_mode  # noqa: E402
from mint_mlx.base.units import parse_budget  # noqa: E402
from mint_mlx.base.versions import versions  # noqa: E402
from mint_mlx.eval.bench.process import machine  # noqa: E402
from mint_mlx.jobs.convert import convert  # noqa: E402
from mint_mlx.jobs.measurements import get_profile  # noqa: E402
from mint_mlx.jobs.model import Job, prepare  # noqa: E402
from mint_mlx.jobs.speed_tables import measure_table  # noqa: E402
from mint_mlx.measure.profile import Profile  # noqa: E402
from mint_mlx.rules.objectives import OBJECTIVES  # noqa: E402
from mint_mlx.runtime.clock import Clock, start_clock, tick_seconds, timed  # noqa: E402
from mint_mlx.runtime.speed_table import layer_seconds, merged  # noqa: E402
from mint_mlx.runtime.speed_table_file import load_table, save_table  # noqa: E402
from mint_mlx.runtime.time_layers import timing  # noqa: E402
from mint_mlx.runtime.time_model import BESIDE, generate_tokens, tokens_at_once  # noqa: E402

CONTEXT = 64  # tokens in the cache, about, while mlx-lm generates
PROMPT = 4
BURSTS = (2, 10)  # in each pass, at least and at most
LIMIT = 3.0  # seconds for each plan, in each pass
PASSES = 100.0  # seconds after which no other pass begins
RANDOM = 50  # plans within the same limits
FASTER = 1.1
RECIPE = """name: speed-check
about: All configurations that MLX has, so that plans differ in speed on a CPU too.
modes: [mxfp4, mxfp8, nvfp4]
"""
OBJECTIVE = "prior"
# Rows of 288 columns take groups of 32 alone, so that 4.5 bits leave nothing to choose there.
BUDGETS = {"": ("4.5bpw", "6bpw"), "stories15m": ("6bpw", "8bpw")}


def main() -> None:
    """Parse the command line, and do one step."""
    steps = {"table": _table, "plans": _plans, "decode": _decode}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=[*steps, "report", "join"])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--folder", type=Path, required=True, help="for all that is made")
    parser.add_argument("--seconds", type=float, default=120.0, help="that the table may take")
    options = parser.parse_args()
    if options.step == "report":
        print(_report(options.folder))
        return
    if options.step == "join":
        tables = [load_table(path) for path in sorted(options.folder.glob("*/table.json"))]
        save_table(reduce(merged, tables), options.folder / "joined.json")
        return
    folder = options.folder / options.model.name
    folder.mkdir(parents=True, exist_ok=True)
    steps[options.step](options.model, folder, options.seconds)


def _job(model: Path, folder: Path) -> Job:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return prepare(str(model), str(recipe))


def _table(model: Path, folder: Path, seconds: float) -> None:
    """Measure the speed table."""
    job = _job(model, folder)
    options = list_candidates(search_space(job.inventory, job.recipe))
    started = time.monotonic()
    table = measure_table(job, options, CONTEXT, seconds)
    save_table(table, folder / "table.json")
    print(f"{model.name}: a table in {time.monotonic() - started:.0f} s")


def _plans(model: Path, folder: Path, _: float) -> None:
    """Make the plans, and write them as checkpoints."""
    job = _job(model, folder)
    inventory = job.inventory
    table = load_table(folder / "table.json")
    pace = Pace(table, CONTEXT)
    profile = get_profile(job)
    space = search_space(inventory, job.recipe)

    # What decodes here is what the table has a time for.
    def chosen(budget: str, goal: Goal) -> Plan:
        plan_pace = Pace(table, CONTEXT, goal)
        return allocate(profile, parse_budget(budget), space, OBJECTIVE, pace=plan_pace)

    anything = Goal("any", tokens_per_second=1e-9)
    usual, larger = BUDGETS.get(model.name, BUDGETS[""])
    free = chosen(usual, anything)
    size = free.layout(inventory).total
    assert free.speed is not None
    wanted = FASTER * free.speed.tokens_per_second
    plans = {
        "uniform 4bit": _uniform(job, BASELINE),
        "uniform 8bit": _uniform(job, QuantConfig(8, 64)),
        "uniform mxfp4": _uniform(job, mx_mode("mxfp4")),
        "unlimited": free,
        "limited": chosen(f"{size}B", Goal("1.1x", tokens_per_second=wanted)),
        "larger": chosen(larger, anything),
    }

    about: dict[str, Any] = {"machine": machine(), "plans": {}}
    for name, plan in plans.items():
        speed = predicted(pace, inventory, plan.choice)
        assert speed is not None
        about["plans"][name] = {
            "bits_per_weight": plan.layout(inventory).total * 8 / inventory.parameters,
            "bytes": plan.layout(inventory).total,
            "predicted": speed.tokens_per_second,
            "loss": plan.loss,
            "gap": plan.gap,
        }
        out = folder / name.replace(" ", "-").replace(",", "")
        convert(
            str(model),
            plan=plan,
            out=out,
            quantizer="rtn",
            force=True,
            smoke=False,
            measurements=False,
        )
    limit = Pace(table, CONTEXT, Goal("1.1x", tokens_per_second=wanted))
    about["random"] = _random_losses(job, profile, limit, size)
    (folder / "plans.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _uniform(job: Job, config: QuantConfig) -> Plan:
    """The same for every layer, in groups of 32 where rows take no others."""
    choice = comparable_choice(job.inventory, config)
    return Plan(job.source.origin, choice, recipe=f"uniform {config}", versions=versions())


def _random_losses(job: Job, profile: Profile, pace: Pace, size: int) -> list[float]:
    """Losses of random plans within the limits.

    Each begins with a random choice; layers in a random order then change to another candidate that
    brings the plan nearer to its limits, until it is within both, and then, in a random order, to
    any that is better and stays within them.
    """
    from mint_mlx.allocation.allocate import candidate_losses, loss_context, safe_candidates

    inventory = job.inventory
    space = search_space(inventory, job.recipe)
    options = safe_candidates(space, profile, parse_budget(f"{size}B"))
    options = timed_candidates(pace, inventory, options)
    context = loss_context(profile, space, options, None)
    objective = OBJECTIVES[OBJECTIVE]
    columns = []
    for layer in inventory.layers:
        configs = options[layer.path]
        losses = candidate_losses(layer, configs, profile.curves[layer.path], objective, context)
        seconds = np.array([layer_seconds(pace.table, layer, c) for c in configs])
        columns.append((np.array([layer.bytes(c) for c in configs]), seconds, losses))
    most = np.array([size - inventory.other_bytes - 4096, seconds_for_layers(pace, inventory)])

    rng = np.random.default_rng(0)
    losses_drawn: list[float] = []
    while len(losses_drawn) < RANDOM:
        picks = np.array([rng.integers(len(c[0])) for c in columns])
        totals = np.array(
            [sum(float(c[kind][k]) for c, k in zip(columns, picks, strict=True)) for kind in (0, 1)]
        )
        for repair in (True, False):
            for i in rng.permutation(len(columns)):
                change = np.stack(
                    [columns[i][kind] - columns[i][kind][picks[i]] for kind in (0, 1)]
                )
                after = np.maximum((totals[:, None] + change) / most[:, None] - 1, 0).sum(0)
                now = np.maximum(totals / most - 1, 0).sum()
                if repair and now > 0:
                    better = np.flatnonzero(after < now)
                else:
                    better = np.flatnonzero(
                        (after == 0) & (columns[i][2] < columns[i][2][picks[i]])
                    )
                if len(better):
                    k = int(rng.choice(better))
                    totals += change[:, k]
                    picks[i] = k
        if (totals <= most).all():
            losses_drawn.append(sum(float(c[2][k]) for c, k in zip(columns, picks, strict=True)))
    return losses_drawn


def _decode(model: Path, folder: Path, _: float) -> None:
    """Let mlx-lm generate from each checkpoint, twice where that takes no minutes."""
    about = json.loads((folder / "plans.json").read_text(encoding="utf-8"))

    # A table that was measured just before tells the machine as it is now.
    inventory = _job(model, folder).inventory
    pace = Pace(load_table(folder / "table.json"), CONTEXT)
    for name, plan in about["plans"].items():
        checkpoint = folder / name.replace(" ", "-").replace(",", "")
        speed = predicted(pace, inventory, read_plan(checkpoint / PLAN_FILE).choice)
        assert speed is not None
        plan["predicted"] = speed.tokens_per_second

    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in about["plans"]}
    clock = start_clock()
    started = time.monotonic()
    while not runs["larger"] or time.monotonic() - started < PASSES:
        for name, times in runs.items():
            times += _token_times(folder / name.replace(" ", "-").replace(",", ""), clock)
    about["clock"] = tick_seconds(clock) / pace.table.clock
    for name, times in runs.items():
        seconds, ticks = (timing(column) for column in zip(*times, strict=True))
        about["plans"][name] |= {
            "decoded": 1 / (ticks.seconds * pace.table.clock),
            "timed": 1 / seconds.seconds,
            "spread": ticks.spread,
        }
        print(name, about["plans"][name])
    about["measured"] = machine()
    (folder / "decoded.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _token_times(checkpoint: Path, clock: Clock) -> list[tuple[float, float]]:
    """Seconds and ticks of a token that stock mlx-lm generates, of each time that it does some."""
    import mlx.core as mx
    from mlx_lm.generate import wired_limit
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(checkpoint)
    caches = make_prompt_cache(model)
    prompt = mx.array(np.random.default_rng(0).integers(0, 200, (1, PROMPT)))
    with wired_limit(model):
        mx.eval(model(prompt, cache=caches))
        tokens, single = tokens_at_once(model, caches)
        burst = partial(generate_tokens, model, tokens, caches)
        count = max(BURSTS[0], min(BURSTS[1], round(LIMIT / (tokens + BESIDE) / single)))
        return [timed(clock, burst, tokens * single) for _ in range(count)]


def _report(folder: Path) -> str:
    """The results of all models as Markdown."""
    lines = [
        "# Predicted and true speed",
        "",
        "By `python eval/bench/speed_check.py`: tokens per second of decoding as a speed table "
        "predicts them, and of mlx-lm's own generation. Speeds of this CPU say nothing of a GPU. "
        "Cores that others share change their speed within seconds, so a small product is timed "
        "beside both (`mint_mlx/runtime/clock.py`): `mlx-lm's` is at the speed that the machine "
        "had while the table was made, `as timed` by the clock on the wall.",
        "",
        _machine_line(folder),
        "",
        "| model | plan | bytes | predicted tokens/s | mlx-lm's | predicted / true | spread | "
        "as timed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    for path in sorted(folder.glob("*/decoded.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        plans = about["plans"]
        for name, plan in plans.items():
            ratio = plan["predicted"] / plan["decoded"]
            model = path.parent.name
            lines.append(
                f"| {model} | {_label(name, plan)} | {plan['bytes']:,} | {plan['predicted']:.3g} | "
                f"{plan['decoded']:.3g} | {ratio:.3f} | {plan['spread']:.1%} | "
                f"{plan['timed']:.3g} |"
            )
        verdicts.append(_verdict(path.parent.name, about))
    return "\n".join([*lines, "", *verdicts])


def _machine_line(folder: Path) -> str:
    """When and where it was measured."""
    first = min(folder.glob("*/decoded.json"))
    about = json.loads(first.read_text(encoding="utf-8"))["measured"]
    return (
        f"{about['date']}: {about['cores']} cores of {about['cpu']}, {about['memory_gb']} GB, "
        f"{about['system']}, mlx {about['mlx']}, mlx-lm {about['mlx_lm']}."
    )


def _label(name: str, plan: dict[str, Any]) -> str:
    """What a plan is called in the table."""
    return f"{name}, {plan['bits_per_weight']:.2f} bpw"


def _verdict(name: str, about: dict[str, Any]) -> str:
    """One model's sentence."""
    plans = about["plans"]
    worst = max(abs(p["decoded"] / p["predicted"] - 1) for p in plans.values())
    pairs = right = 0
    for a, b in itertools.combinations(plans.values(), 2):
        true = a["decoded"] / b["decoded"]
        if abs(true - 1) > max(a["spread"], b["spread"], 0.01):
            pairs += 1
            right += (true > 1) == (a["predicted"] > b["predicted"])
    free, limited = plans["unlimited"], plans["limited"]
    gain = limited["decoded"] / free["decoded"]
    better = sum(limited["loss"] <= loss * (1 + 1e-9) for loss in about["random"])
    ratio = limited["loss"] / statistics.median(about["random"])
    return (
        f"- {name}: decode time within {worst:.1%} of mlx-lm's; the order right in {right} of "
        f"{pairs} pairs that differ by more than the spread; limited to 1.1x it decodes "
        f"{gain:.3f}x as fast with {limited['bytes'] / free['bytes']:.4f}x the bytes, its loss at "
        f"most that of {better} of {len(about['random'])} random plans ({ratio:.2f}x their median)."
    )


if __name__ == "__main__":
    main()
