"""`mint-mlx demo`: the whole job on a really trained Mixture-of-Experts model of 2.3 M parameters,
shipped inside.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import JsonOpt, start

if TYPE_CHECKING:
    from .output import Output

MODEL = Path(__file__).parent.parent / "demo" / "demo-moe"
WINDOWS, LENGTH = 40, 256


def demo(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Keep the result in this folder.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Run the whole job on a small, really trained Mixture-of-Experts model that comes with the
    program.
    """
    output = start(as_json)

    run(output, out)


def run(output: Output, out: Path | None = None) -> None:
    """Profile, allocate, convert, reload, generate, and score the result beside its source and
    uniform quantization.

    Args:
        output: where to print.
        out: keep the result here; it is thrown away otherwise.
    """
    from ..base.units import both, duration
    from ..jobs.convert import convert

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mint-mlx-demo-") as scratch:
        source = Path(scratch) / "demo-moe"
        shutil.copytree(MODEL, source)
        uniform = convert(
            str(source), None, f"{scratch}/uniform", uniform="4bit-g64", smoke=False, report=output
        )
        target = out or Path(scratch) / "demo-moe-mint"
        ours = convert(str(source), f"{uniform.bytes}B", target, report=output)
        output.close()
        output.line(
            "A Qwen3-MoE of 2.3 M parameters, converted to the size of its uniform 4-bit version: "
            f"{both(ours.bytes)}"
        )
        output.line(f"stock mlx-lm loads it, and it writes: {ours.sentence}")
        rows, data = [], []
        total = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        folders = [
            ("source (bf16)", source, total),
            ("mint-mlx", target, ours.bytes),
            ("uniform 4bit-g64", uniform.path, uniform.bytes),
        ]
        for name, folder, size in folders:
            perplexity = _perplexity(folder, output)
            bits = size * 8 / ours.inventory.parameters
            rows.append([name, f"{size:,}", f"{bits:.2f}", f"{perplexity:.3f}"])
            data.append(
                {"name": name, "bytes": size, "bits_per_weight": bits, "perplexity": perplexity}
            )
        output.close()
        output.table(
            ["checkpoint", "bytes", "bpw", "perplexity"],
            rows,
            f"WikiText-2 test, the first {WINDOWS} windows of {LENGTH}",
        )
        output.line(
            f"done in {duration(time.monotonic() - started)}; now your own: mint-mlx convert "
            "org/name --budget 19GB"
        )
        output.result(
            {"rows": data, "sentence": ours.sentence, "seconds": time.monotonic() - started}
        )


def _perplexity(folder: Path, output: Output) -> float:
    from ..eval.evaluate import evaluate
    from ..eval.settings import Settings

    settings = Settings(length=LENGTH, windows=WINDOWS)
    return float(evaluate(str(folder), settings, report=output)["perplexity"])
