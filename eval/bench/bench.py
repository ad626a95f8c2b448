"""Speed and memory on released models' shapes, beside `mlx_lm.convert -q` in the same run.

    python eval/bench/bench.py           two layers of Qwen3-30B-A3B, median of 3 (under 10 minutes)
    python eval/bench/bench.py --full    the slopes over 2, 4 and 8 layers, other shapes, and the
                                         steps of `balanced`
    python eval/bench/bench.py --typed qwen3-30b-a3b:4
                                         one shape and depth, once: what a user types, alone

All write eval/bench/results.json and results.md. Models are made in a temporary folder and removed
again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mint_mlx.base.folders import UNMARKED
from mint_mlx.base.remove import UNFINISHED, Kind, discard
from mint_mlx.base.scratch import scratch_folder
from mint_mlx.eval.bench.process import Run, last_json, machine, of_tree, python, run
from mint_mlx.eval.bench.shapes import SHAPES

FOLDER = Path(__file__).parent
MAIN = "qwen3-30b-a3b"
ROUNDS = 3
DEPTHS = (2, 4, 8)
OTHERS = {"mixtral-8x7b": 2, "deepseek-v3-fp8": 1, "qwen3.5-35b-a3b": 2, "gpt-oss-20b": 2}
PEER_CANNOT = ("deepseek-v3-fp8", "gpt-oss-20b")  # mlx-lm holds all of one, and keeps the other
PARTS = ("quick", "slopes", "levels", "shapes")
ALONE = "typed"  # a part of models by name and depth, each with the machine that it was timed on
TOKENS = (1024, 4096)
LIMIT = 120  # seconds for mlx-lm's gptq: on these shapes it copies all experts for each column
TEXT_TOKENS = 16_384  # of the model's own text that `balanced` sees
PEER = "mlx_lm.convert -q --q-bits 4"
MEASURED = Kind("a folder", ("*.json", "*.npz", "*.begun-*", UNFINISHED))
CACHE = Kind("a cache", (), {"profiles": MEASURED, "sensitivities": MEASURED})
BENCH = Kind(
    "a benchmark",
    ("log", "plan.yaml", "profile.json", "*.npz"),
    {**CACHE.folders, "cache": CACHE, "model": UNMARKED, "out": UNMARKED, "levels": UNMARKED},
)
TYPED = "convert --effort fast"  # as a user types it, with the sentence at the end
ROUNDED = f"{TYPED} --quantizer rtn"
OLDER = ", older build"


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="also the slopes and other shapes")
    parser.add_argument("--part", action="append", choices=PARTS, help="this part alone")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the first part")
    parser.add_argument("--typed", metavar="SHAPE:LAYERS", help="what a user types, of this model")
    parser.add_argument("--older", type=Path, help="another commit's checkout, timed beside")
    parser.add_argument("--folder", type=Path, help="where models are made (needs 25 GB)")
    options = parser.parse_args()

    # After each part, so that an interruption loses only one.
    results = _read()
    with scratch_folder(BENCH, options.folder) as folder:
        if options.typed:
            shape, _, layers = options.typed.partition(":")
            typed = measure(shape, int(layers), 1, folder, options.older, (PEER, ROUNDED, TYPED))
            results.setdefault(ALONE, {})[options.typed] = {"machine": machine(), "measured": typed}
            _write(results)
            print(report(results))
            return
        for part in options.part or (PARTS[1:] if options.full else PARTS[:1]):
            measured = _measure_part(part, folder, options.older, options.rounds)
            results[part] = {"machine": machine(), "measured": measured, "rounds": options.rounds}
            _write(results)
    print(report(results))


def _write(results: dict[str, Any]) -> None:
    """Write results.json and results.md."""
    text = json.dumps(results, indent=1) + "\n"
    (FOLDER / "results.json").write_text(text, encoding="utf-8")
    (FOLDER / "results.md").write_text(report(results), encoding="utf-8")


def _read() -> dict[str, Any]:
    """The results of earlier runs."""
    file = FOLDER / "results.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return results


# Measuring


def _measure_part(part: str, folder: Path, older: Path | None, rounds: int) -> dict[str, Any]:
    if part == "quick":
        return measure(MAIN, DEPTHS[0], rounds, folder, older)
    if part == "slopes":
        return {str(depth): measure(MAIN, depth, 1, folder, older) for depth in DEPTHS}
    if part == "levels":
        return levels(folder)
    return {shape: measure(shape, depth, 1, folder, older) for shape, depth in OTHERS.items()}


def make(shape: str, layers: int, folder: Path) -> int:
    """Write a model in a process of its own; returns its bytes.

    A child's peak of memory begins with its parent's, so this process stays small.
    """
    command = python(FOLDER / "make_model.py", shape, "--layers", str(layers), "-o", folder)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return int(index["metadata"]["total_size"])


def measure(
    shape: str,
    layers: int,
    rounds: int,
    folder: Path,
    older: Path | None = None,
    ways: Sequence[str] = (),
) -> dict[str, Any]:
    """Each way's median seconds and highest peak, on a model that is made for it.

    The ways take turns. `--plan` takes the plan that `--effort fast` made before it. `older` is a
    checkout of another commit, whose ways are timed in the same run. `ways` are those wanted; all
    by default.
    """
    model = folder / "model"
    out = folder / "out"
    size = make(shape, layers, model)
    commands = _commands(model, out, folder)
    commands = {way: commands[way] for way in ways or commands}
    if older is not None:
        commands |= _of_build(older, commands)
    runs: dict[str, list[Run]] = {way: [] for way in commands}
    if shape in PEER_CANNOT:
        del commands[PEER]

    for _ in range(rounds):
        for way, command in commands.items():
            discard(folder / "cache", CACHE)
            runs[way].append(run(command, folder / "log", folder / "cache"))
            print(f"{shape}, {layers} layers: {way} {runs[way][-1].seconds:.1f} s", flush=True)
            if way == ROUNDED:
                shutil.copyfile(out / "mint-plan.yaml", folder / "plan.yaml")
            discard(out, UNMARKED)
    discard(model, UNMARKED)

    figures = {
        way: {
            "seconds": statistics.median(r.seconds for r in of_way),
            "peak": max(r.peak for r in of_way),
        }
        for way, of_way in runs.items()
        if of_way
    }
    return {
        "shape": shape,
        "layers": layers,
        "of": SHAPES[shape][1],
        "bytes": size,
        "ways": figures,
    }


def _commands(model: Path, out: Path, folder: Path) -> dict[str, list[str]]:
    """The command line of each way, in the order in which they run."""
    mlx_lm = ("-m", "mlx_lm", "convert", "--hf-path", model, "-q", "--q-bits", "4")
    convert = ("-m", "mint_mlx", "convert", model, "-o", out)
    fast = (*convert, "--budget", "4.5bpw", "--effort", "fast")
    profile = ("-m", "mint_mlx", "profile", model, "-o", folder / "profile.json")
    return {
        PEER: python(*mlx_lm, "--mlx-path", out),
        "profile": python(*profile),
        ROUNDED: python(*fast, "--quantizer", "rtn"),
        TYPED: python(*fast),
        f"{TYPED} --no-smoke": python(*fast, "--no-smoke"),
        "convert --plan": python(*convert, "--plan", folder / "plan.yaml", "--no-smoke"),
    }


def _of_build(tree: Path, commands: dict[str, list[str]]) -> dict[str, list[str]]:
    """The conversions by a budget as another checkout runs them."""
    return {
        f"{way}{OLDER}": of_tree(tree, command)
        for way, command in commands.items()
        if way.startswith(TYPED)
    }


def levels(folder: Path) -> dict[str, Any]:
    """Each step of `balanced` for two numbers of tokens, on two layers.

    mlx-lm's gptq runs for the smaller number only.
    """
    model = folder / "levels"
    make(MAIN, 2, model)
    results: dict[str, Any] = {}
    for count in TOKENS:
        for step in ("text", "sensitivity", "feedback", "peer"):
            if step == "peer" and count != TOKENS[0]:
                continue
            command = python(FOLDER / "levels.py", model, step, "--tokens", str(count))
            limit = LIMIT if step == "peer" else 3600
            process = run(command, folder / "log", folder, limit)
            seconds: dict[str, Any] = {"seconds": LIMIT, "stopped": True}
            if not process.stopped:
                seconds = last_json(folder / "log")
            results.setdefault(step, {})[str(count)] = seconds | {"peak": process.peak}
            print(f"{step}, {count} tokens: {results[step][str(count)]}", flush=True)
    discard(model, UNMARKED)
    return results


# Writing


def report(results: dict[str, Any]) -> str:
    """The text of results.md."""
    lines = [
        "# Speed and memory",
        "",
        "By `make bench` and `make bench-full`, on random weights in true shapes.",
        "",
    ]
    rounds = results.get("quick", {}).get("rounds", ROUNDS)
    titles = {
        "quick": f"Two layers of Qwen3-30B-A3B, {'once' if rounds == 1 else f'median of {rounds}'}",
        "slopes": "Depth",
        "levels": "What `balanced` adds",
        "shapes": "Other shapes",
    }
    for part, title in titles.items():
        if part not in results:
            continue

        # A part's results are one model, several by name or depth, or the steps of `balanced`.
        measured = results[part]["measured"]
        lines += [f"## {title}", "", machine_line(results[part]["machine"]), ""]
        if part == "quick":
            lines += _table([measured])
        elif part == "slopes":
            lines += [*_table(list(measured.values())), "", *_slopes(measured)]
        elif part == "levels":
            lines += _levels(measured)
        else:
            lines += _table(list(measured.values()))
        lines.append("")
    if ALONE in results:
        lines += ["## As it is typed, once each", ""]
    for entry in results.get(ALONE, {}).values():
        lines += [machine_line(entry["machine"]), "", *_table([entry["measured"]]), ""]
    return "\n".join(lines)


def machine_line(m: dict[str, Any]) -> str:
    return (
        f"{m['date']}: {m['cores']} cores of {m['cpu']}, {m['memory_gb']} GB, {m['system']}, BLAS "
        f"{m['blas']}, mlx {m['mlx']}, mlx-lm {m['mlx_lm']}. Files in the page cache."
    )


def _table(models: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | layers | | seconds | ratio | peak memory |", "|---|---|---|---|---|---|"]
    for model in models:
        base = model["ways"].get(PEER)
        for way, figures in model["ways"].items():
            ratio = f"{figures['seconds'] / base['seconds']:.2f}x" if base else "-"
            lines.append(
                f"| {model['shape']} | {model['layers']} of {model['of']} | {way} | "
                f"{figures['seconds']:.1f} | {ratio} | {figures['peak'] / 1e9:.2f} GB |"
            )
    return lines


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and start of the least-squares line."""
    import numpy as np

    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(start)


def _slopes(models: dict[str, dict[str, Any]]) -> list[str]:
    """The table of what a layer costs, and with it the whole model."""
    depth = SHAPES[MAIN][1]
    sizes = [model["bytes"] for model in models.values()]
    layer = (sizes[-1] - sizes[0]) / (DEPTHS[-1] - DEPTHS[0])
    lines = [
        f"Extrapolated to all {depth} layers, of {layer / 1e9:.2f} GB each (slope x {depth} + the "
        "ends):",
        "",
        "| | seconds a layer | whole model | memory a layer | share of its bytes |",
        "|---|---|---|---|---|",
    ]
    for way in next(iter(models.values()))["ways"]:
        of_way = [model["ways"][way] for model in models.values()]
        seconds, start = fit_line(DEPTHS, [figures["seconds"] for figures in of_way])
        memory, _ = fit_line(DEPTHS, [figures["peak"] for figures in of_way])
        lines.append(
            f"| {way} | {seconds:.1f} | {(start + seconds * depth) / 60:.1f} minutes | "
            f"{memory / 1e6:.0f} MB | {memory / layer:.1%} |"
        )
    return lines


def _levels(results: dict[str, Any]) -> list[str]:
    """The table of the steps of `balanced`, extrapolated to the whole model."""
    names = {
        "text": "its own text (four passes)",
        "sensitivity": "sensitivity",
        "feedback": "error feedback, written",
        "peer": "mlx-lm's `gptq`, model in memory",
    }
    depth = SHAPES[MAIN][1]
    few, many = TOKENS
    lines = [
        f"Two streamed layers of Qwen3-30B-A3B with {few} and {many} tokens; extrapolated to "
        f"{depth} layers and {TEXT_TOKENS} tokens (a layer's constant and slope x {depth} + the "
        "ends'):",
        "",
        f"| | seconds, {few} tokens | {many} tokens | a layer: start + each 1,000 tokens | whole "
        "model | peak |",
        "|---|---|---|---|---|---|",
    ]

    whole = dict.fromkeys((TEXT_TOKENS, many), 0.0)
    for step, runs in results.items():
        low = runs[str(few)]
        peak = max(figures["peak"] for figures in runs.values()) / 1e9
        if str(many) not in runs:
            over = "stopped after " if low.get("stopped") else ""
            lines.append(
                f"| {names[step]} | {over}{low['seconds']:.0f} | - | - | - | {peak:.1f} GB |"
            )
            continue

        # Two layers are two equal blocks and the ends; each of them is a line in the tokens.
        high = runs[str(many)]
        ends = [figures["seconds"] - 2 * figures["layer"] for figures in (low, high)]
        each, start = fit_line(TOKENS, [low["layer"], high["layer"]])
        end_each, end_start = fit_line(TOKENS, ends)
        total = {n: depth * (start + each * n) + end_start + end_each * n for n in whole}
        whole = {n: whole[n] + total[n] for n in whole}
        lines.append(
            f"| {names[step]} | {low['seconds']:.0f} | {high['seconds']:.0f} | {start:.1f} + "
            f"{1000 * each:.1f} | {total[TEXT_TOKENS] / 60:.0f} minutes | {peak:.1f} GB |"
        )
    return [
        *lines,
        "",
        f"In all {whole[TEXT_TOKENS] / 60:.0f} minutes; with `--tokens {many}` "
        f"{whole[many] / 60:.0f}.",
    ]


if __name__ == "__main__":
    main()
