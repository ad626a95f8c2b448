"""Speed and memory on released models' shapes, beside `mlx_lm.convert -q --q-bits 4` in the same
run.

    python eval/bench/bench.py            two layers of Qwen3-30B-A3B, median of 3 (under ten
    minutes) python eval/bench/bench.py --full     the slopes over 2, 4 and 8 layers, other shapes,
    what `balanced` adds

Both write eval/bench/results.json and results.md. Models are made in a temporary folder and removed
again."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .process import Run, last_json, machine, python, run
from .shapes import SHAPES

HERE = Path(__file__).parent
MAIN = "qwen3-30b-a3b"
ROUNDS = 3
DEPTHS = (2, 4, 8)
OTHERS = {"mixtral-8x7b": 2, "deepseek-v3-fp8": 1, "qwen3.5-35b-a3b": 2, "gpt-oss-20b": 2}
PARTS = ("quick", "slopes", "levels", "shapes")
TOKENS = (1024, 4096)
# seconds that mlx-lm's gptq is given: on these shapes it copies all experts for each column
LIMIT = 120
OWN_TOKENS = 16_384  # that `balanced` looks at
PEER = "mlx_lm.convert -q --q-bits 4"
WAYS = (PEER, "convert --plan", "profile", "convert --effort fast")


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the slopes and the other shapes, too")
    parser.add_argument("--part", action="append", choices=PARTS, help="this part alone")
    parser.add_argument("--folder", type=Path, help="where models are made (25 GB are needed)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mint-mlx-bench-", dir=asked.folder) as folder:
        found, place = _read(), Path(folder)
        for part in asked.part or (PARTS[1:] if asked.full else PARTS[:1]):
            measured: dict[str, Any]
            if part == "quick":
                measured = measure(MAIN, DEPTHS[0], ROUNDS, place)
            elif part == "slopes":
                measured = {str(n): measure(MAIN, n, 1, place) for n in DEPTHS}
            elif part == "levels":
                measured = levels(place)
            else:
                measured = {name: measure(name, n, 1, place) for name, n in OTHERS.items()}
            found[part] = {"machine": machine(), "measured": measured}
            (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (HERE / "results.md").write_text(report(found), encoding="utf-8")
        print(report(found))


def _read() -> dict[str, Any]:
    file = HERE / "results.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def make(shape: str, layers: int, folder: Path) -> int:
    """Write a model in a process of its own (a child's peak begins with its parent's); returns its
    bytes.
    """
    command = python(str(HERE / "make_model.py"), shape, "--layers", str(layers), "-o", str(folder))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return int(index["metadata"]["total_size"])


def measure(shape: str, layers: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Each way's median seconds and highest peak on a model that is made for it; the ways take
    turns.
    """
    model, out, log, cache = (folder / name for name in ("model", "out", "log", "cache"))
    size = make(shape, layers, model)
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    ours = ["-m", "mint_mlx", "convert", str(model), "-o", str(out), "--no-smoke"]
    commands = {
        PEER: python(
            "-m",
            "mlx_lm",
            "convert",
            "--hf-path",
            str(model),
            "-q",
            "--q-bits",
            "4",
            "--mlx-path",
            str(out),
        ),
        "profile": python(
            "-m", "mint_mlx", "profile", str(model), "-o", str(folder / "profile.json")
        ),
        "convert --effort fast": python(*ours, "--budget", "4.5bpw", "--effort", "fast"),
        "convert --plan": python(*ours, "--plan", str(folder / "plan.yaml")),
    }
    peer = (
        shape != "deepseek-v3-fp8" and shape != "gpt-oss-20b"
    )  # mlx-lm holds all of the one, and keeps the other
    for _ in range(rounds):
        for way, command in commands.items():
            if way == PEER and not peer:
                continue
            shutil.rmtree(cache, ignore_errors=True)
            runs[way].append(run(command, log, cache))
            print(f"{shape}, {layers} layers: {way} {runs[way][-1].seconds:.1f} s", flush=True)
            if way == "convert --effort fast":
                shutil.copyfile(out / "mint-plan.yaml", folder / "plan.yaml")
            shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(model)
    ways = {
        way: {
            "seconds": statistics.median(r.seconds for r in some),
            "peak": max(r.peak for r in some),
        }
        for way, some in runs.items()
        if some
    }
    return {"shape": shape, "layers": layers, "of": SHAPES[shape][1], "bytes": size, "ways": ways}


def levels(folder: Path) -> dict[str, Any]:
    """What `balanced` adds for two numbers of tokens, on two layers, and mlx-lm's gptq for the
    smaller one.
    """
    model = folder / "levels"
    make(MAIN, 2, model)
    found: dict[str, Any] = {}
    for count in TOKENS:
        for what in ("text", "sensitivity", "feedback", "peer"):
            if what == "peer" and count != TOKENS[0]:
                continue
            command = python(str(HERE / "levels.py"), str(model), what, "--tokens", str(count))
            done = run(command, folder / "log", folder, LIMIT if what == "peer" else 3600)
            told = (
                {"seconds": LIMIT, "stopped": True} if done.stopped else last_json(folder / "log")
            )
            found.setdefault(what, {})[str(count)] = told | {"peak": done.peak}
            print(f"{what}, {count} tokens: {found[what][str(count)]}", flush=True)
    shutil.rmtree(model)
    return found


def report(found: dict[str, Any]) -> str:
    """results.md."""
    lines = [
        "# Speed and memory",
        "",
        "By `make bench` and `make bench-full`, on random weights in true shapes.",
        "",
    ]
    titles = {
        "quick": f"Two layers of Qwen3-30B-A3B, median of {ROUNDS}",
        "slopes": "Depth",
        "levels": "What `balanced` adds",
        "shapes": "Other shapes",
    }
    for part, title in titles.items():
        if part not in found:
            continue
        data = found[part]["measured"]
        lines += [f"## {title}", "", _where(found[part]["machine"]), ""]
        if part == "levels":
            lines += _levels(data)
        else:
            lines += _table([data] if part == "quick" else list(data.values()))
        lines += ["", *_slopes(data)] if part == "slopes" else []
        lines.append("")
    return "\n".join(lines)


def _where(machine: dict[str, Any]) -> str:
    m = machine
    return (
        f"{m['date']}: {m['cores']} cores of {m['cpu']}, {m['memory_gb']} GB, {m['system']}, BLAS "
        f"{m['blas']}, mlx {m['mlx']}, mlx-lm {m['mlx_lm']}. Files in the page cache."
    )


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | layers | | seconds | ratio | peak memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        base = row["ways"].get(PEER)
        for way, got in row["ways"].items():
            ratio = f"{got['seconds'] / base['seconds']:.2f}x" if base else "-"
            lines.append(
                f"| {row['shape']} | {row['layers']} of {row['of']} | {way} | {got['seconds']:.1f} "
                f"| {ratio} | {got['peak'] / 1e9:.2f} GB |"
            )
    return lines


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and start of the least-squares line."""
    import numpy as np

    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(start)


def _slopes(rows: dict[str, dict[str, Any]]) -> list[str]:
    depth, sizes = SHAPES[MAIN][1], [row["bytes"] for row in rows.values()]
    layer = (sizes[-1] - sizes[0]) / (DEPTHS[-1] - DEPTHS[0])
    lines = [
        f"Extrapolated to all {depth} layers, of {layer / 1e9:.2f} GB each (slope x {depth} + the "
        "ends):",
        "",
        "| | seconds a layer | whole model | memory a layer | share of its bytes |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        of_way = [row["ways"][way] for row in rows.values()]
        seconds, start = line(DEPTHS, [one["seconds"] for one in of_way])
        memory, _ = line(DEPTHS, [one["peak"] for one in of_way])
        lines.append(
            f"| {way} | {seconds:.1f} | {(start + seconds * depth) / 60:.1f} minutes | "
            f"{memory / 1e6:.0f} MB | {memory / layer:.1%} |"
        )
    return lines


def _levels(found: dict[str, Any]) -> list[str]:
    names = {
        "text": "its own text (four passes)",
        "sensitivity": "sensitivity",
        "feedback": "error feedback, written",
        "peer": "mlx-lm's `gptq`, model in memory",
    }
    depth, (few, many) = SHAPES[MAIN][1], TOKENS
    lines = [
        f"Two streamed layers of Qwen3-30B-A3B with {few} and {many} tokens; extrapolated to "
        f"{depth} layers and {OWN_TOKENS} tokens (a layer's constant and slope x {depth} + the "
        "ends'):",
        "",
        f"| | seconds, {few} tokens | {many} tokens | a layer: start + each 1,000 tokens | whole "
        "model | peak |",
        "|---|---|---|---|---|---|",
    ]
    whole = dict.fromkeys((OWN_TOKENS, many), 0.0)
    for what, got in found.items():
        low, peak = got[str(few)], max(run["peak"] for run in got.values()) / 1e9
        if str(many) not in got:
            over = "stopped after " if low.get("stopped") else ""
            lines.append(
                f"| {names[what]} | {over}{low['seconds']:.0f} | - | - | - | {peak:.1f} GB |"
            )
            continue
        high = got[str(many)]
        ends = [run["seconds"] - 2 * run["layer"] for run in (low, high)]
        each, start = line(TOKENS, [low["layer"], high["layer"]])
        end_each, end_start = line(TOKENS, ends)
        total = {n: depth * (start + each * n) + end_start + end_each * n for n in whole}
        whole = {n: whole[n] + total[n] for n in whole}
        lines.append(
            f"| {names[what]} | {low['seconds']:.0f} | {high['seconds']:.0f} | {start:.1f} + "
            f"{1000 * each:.1f} | {total[OWN_TOKENS] / 60:.0f} minutes | {peak:.1f} GB |"
        )
    return [
        *lines,
        "",
        f"In all {whole[OWN_TOKENS] / 60:.0f} minutes; with `--tokens {many}` "
        f"{whole[many] / 60:.0f}.",
    ]


if __name__ == "__main__":
    main()
