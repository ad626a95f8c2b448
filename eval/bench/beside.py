"""Time and memory of this version beside an earlier one, in one run, nothing cached.

    git worktree add ../base COMMIT
    python eval/bench/beside.py --base ../base --name COMMIT demo-moe FOLDER...
    make bench BASE=../base

Each model is converted with `--budget 4.5bpw` by both; `--effort best` takes that level. The word
`layers` stands for the three steps of `balanced` on two streamed layers of Qwen3-30B-A3B with 4,096
tokens, which each version's own levels.py times. The versions take turns; results go into
beside.json and beside.md, beside those of other models and levels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mint_mlx.base.folders import UNMARKED
from mint_mlx.base.remove import discard
from mint_mlx.base.scratch import scratch_folder
from mint_mlx.eval.bench.bench import BENCH, CACHE, FOLDER, MAIN, machine_line, make
from mint_mlx.eval.bench.process import Run, last_json, machine, of_tree, python, run

OURS = Path(__file__).resolve().parents[2]
DEMO = OURS / "mint_mlx" / "demo"
LAYERS = "layers"
STEPS = {"text": "its own text", "sensitivity": "sensitivity", "feedback": "error feedback"}
TOKENS = 4096


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="a folder of the earlier version")
    parser.add_argument("--name", required=True, help="of the earlier version, for the table")
    parser.add_argument("--effort", default="balanced", help="the level of the conversions")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--folder", type=Path, help="where results are made (layers: 6 GB)")
    parser.add_argument("models", nargs="+", help="demo-moe, folders, or layers")
    options = parser.parse_args()

    file = FOLDER / "beside.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    versions = {"base": options.base.resolve(), "ours": OURS}
    with scratch_folder(BENCH, options.folder) as folder:
        for model in options.models:
            measured = (
                of_layers(versions, options.rounds, folder)
                if model == LAYERS
                else {options.effort: of_model(model, versions, options, folder)}
            )
            for what, row in measured.items():
                name = Path(model).name
                row |= {"machine": machine(), "rounds": options.rounds, "earlier": options.name}
                results.setdefault(name, {})[what] = row
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (FOLDER / "beside.md").write_text(report(results), encoding="utf-8")
    print(report(results))


def of_model(
    model: str, versions: dict[str, Path], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """A whole conversion by both versions."""
    source = DEMO / model if (DEMO / model).is_dir() else Path(model)
    arguments = ("convert", source, "--budget", "4.5bpw", "--effort", options.effort, "--no-smoke")
    command = python("-m", "mint_mlx", *arguments, "-o", folder / "out")
    runs: dict[str, list[Run]] = {name: [] for name in versions}
    for _ in range(options.rounds):
        for name, tree in versions.items():
            discard(folder / "cache", CACHE)
            runs[name].append(run(of_tree(tree, command), folder / "log", folder / "cache"))
            discard(folder / "out", UNMARKED)
    return {
        name: summary([r.seconds for r in of_version], of_version)
        for name, of_version in runs.items()
    }


def of_layers(versions: dict[str, Path], rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
    """The steps of `balanced` on two layers of a large shape, by both versions."""
    model = folder / "levels"
    make(MAIN, 2, model)
    runs: dict[str, dict[str, list[tuple[float, Run]]]] = {}
    for _ in range(rounds):
        for name, tree in versions.items():
            for step in STEPS:  # error feedback takes the sensitivity that was just measured
                script = tree / "eval" / "bench" / "levels.py"
                command = python(script, model, step, "--tokens", str(TOKENS))
                done = run(of_tree(tree, command), folder / "log", folder)
                seconds = last_json(folder / "log")["seconds"]
                runs.setdefault(step, {}).setdefault(name, []).append((seconds, done))
    discard(model, UNMARKED)
    return {
        STEPS[step]: {
            name: summary([seconds for seconds, _ in pairs], [done for _, done in pairs])
            for name, pairs in of_step.items()
        }
        for step, of_step in runs.items()
    }


def summary(seconds: list[float], runs: list[Run]) -> dict[str, float]:
    """The median seconds and the highest peak."""
    return {"seconds": statistics.median(seconds), "peak": max(run.peak for run in runs)}


def report(results: dict[str, Any]) -> str:
    """The text of beside.md."""
    lines = [
        "# This version beside an earlier one",
        "",
        "By `eval/bench/beside.py`, at 4.5 bits per weight, nothing cached; medians of the rounds.",
        "",
        "| model | | rounds | earlier | seconds | this version | ratio | peak: earlier | this |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    machines = []
    for model, of_model in sorted(results.items()):
        for what, row in of_model.items():
            before, after = row["base"], row["ours"]
            lines.append(
                f"| {model} | {what} | {row['rounds']} | {row['earlier']} | "
                f"{before['seconds']:.1f} | {after['seconds']:.1f} | "
                f"**{after['seconds'] / before['seconds']:.2f}x** | {before['peak'] / 1e9:.2f} GB "
                f"| {after['peak'] / 1e9:.2f} GB |"
            )
            machines.append(machine_line(row["machine"]))
    return "\n".join([*lines, "", *dict.fromkeys(machines), ""])


if __name__ == "__main__":
    main()
