"""`mint-mlx demo`: the whole job on a trained Mixture-of-Experts model of 2.3 M parameters."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOpt, start

if TYPE_CHECKING:
    from .output import Output

MODEL = Path(__file__).parent.parent / "demo" / "demo-moe"
WINDOWS, LENGTH = 40, 256


def demo(
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder to write; the result is deleted otherwise."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Try the whole job in a few seconds, on a small trained model that comes with the program."""
    run(start(as_json), out)


def run(output: Output, out: Path | None = None) -> None:
    """Convert the demo model, and score the result beside its source and uniform quantization.

    Args:
        output: where to print.
        out: the folder to write; the result is deleted otherwise.
    """
    from ..base.folders import UNMARKED
    from ..base.remove import Kind
    from ..base.scratch import scratch_folder
    from ..base.units import both, duration
    from ..checkpoint.run_command import run_command
    from ..jobs.convert import convert

    started = time.monotonic()
    output.note(
        "nothing is downloaded: the model (4.6 MB) and the text come with the program; it takes "
        "about half a minute"
    )
    with scratch_folder(Kind("a demo", (), {"*": UNMARKED})) as scratch:
        source = scratch / "demo-moe"
        shutil.copytree(MODEL, source)

        # The same bytes, spent uniformly and as chosen.
        uniform = convert(
            str(source), None, f"{scratch}/uniform", uniform="4bit-g64", smoke=False, report=output
        )
        target = out or scratch / "demo-moe-mint"
        mixed = convert(str(source), f"{uniform.bytes}B", target, report=output)
        output.close()
        output.line(
            "A Qwen3-MoE of 2.3 M parameters, converted to the size of its uniform 4-bit version: "
            f"{both(mixed.bytes)}"
        )
        output.line(f"stock mlx-lm loads it, and it writes: {mixed.sentence}")

        total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        folders = [
            ("source (bf16)", source, total),
            ("mint-mlx", target, mixed.bytes),
            ("uniform 4bit-g64", uniform.path, uniform.bytes),
        ]
        scores = _score(folders, mixed.inventory.parameters, output)
        output.close()
        output.table(
            ["checkpoint", "bytes", "bpw", "perplexity"],
            [
                [
                    score["name"],
                    f"{score['bytes']:,}",
                    f"{score['bits_per_weight']:.2f}",
                    f"{score['perplexity']:.3f}",
                ]
                for score in scores
            ],
            f"WikiText-2 test, the first {WINDOWS} windows of {LENGTH}",
        )
        if out is not None:
            output.line(run_command(out, str(out)))
        seconds = time.monotonic() - started
        output.line(
            f"done in {duration(seconds)}; now your own: mint-mlx convert org/name --budget 19GB"
        )
        output.result({"rows": scores, "sentence": mixed.sentence, "seconds": seconds})


def _score(
    folders: list[tuple[str, Path, int]], parameters: int, output: Output
) -> list[dict[str, Any]]:
    """Size and perplexity of checkpoints, given as name, folder and bytes.

    Raises:
        KeyboardInterrupt: also where some windows were finished, since checkpoints are compared.
    """
    from ..eval.evaluate import evaluate
    from ..eval.settings import Settings

    settings = Settings(length=LENGTH, windows=WINDOWS)
    scores: list[dict[str, Any]] = []
    for name, folder, size in folders:
        figures = evaluate(str(folder), settings, report=output)
        if figures["interrupted"]:
            raise KeyboardInterrupt

        bits = size * 8 / parameters
        perplexity = float(figures["perplexity"])
        scores.append(
            {"name": name, "bytes": size, "bits_per_weight": bits, "perplexity": perplexity}
        )
    return scores
