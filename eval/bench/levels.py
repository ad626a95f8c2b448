"""What looking at a model's own text costs, on two layers of a model: one JSON line, in seconds.

    python eval/bench/levels.py MODEL text|sensitivity|feedback|peer --tokens 2048

The model is streamed, as one that doesn't fit in memory is. `text` is what writing it costs (four
passes); `feedback` converts with error feedback, on the sensitivity that `sensitivity` left beside
the model; `peer` is mlx-lm's `gptq_quantize` on the same tokens, with the model whole in memory.
`layer` is the share of the last block, the rest of `seconds` being the first one and the ends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...base.blas import use_fast_blas
from ...base.report import Silent

use_fast_blas()

LENGTH = 256


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("what", choices=("text", "sensitivity", "feedback", "peer"))
    parser.add_argument("--tokens", type=int, default=2048)
    asked = parser.parse_args()
    function = {"text": _text, "sensitivity": _sensitivity, "feedback": _feedback, "peer": _peer}[
        asked.what
    ]
    print(json.dumps(function(asked.model, asked.tokens)))


class Clock(Silent):
    """A report that remembers when each step of a piece of work was told."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}
        self.start = time.monotonic()

    def step(self, what: str, done: int, total: int) -> None:
        self.told.setdefault(what, time.monotonic())

    def between(self, first: str, last: str) -> float:
        return self.told[last] - self.told[first]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def _tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (count // LENGTH, LENGTH)).astype(np.int32)


def _text(model: Path, count: int) -> dict[str, float]:
    import mlx.core as mx

    from ...measure.self_text import PASSES, resample
    from ...runtime.blocks import forward_blocks
    from ...runtime.runner import load_runner

    clock, tokens = Clock(), _tokens(count)
    resample(load_runner(model, True), tokens, mx.random.key(0))
    seconds, clock = clock.seconds, Clock()
    for step, _, _ in forward_blocks(load_runner(model, True), tokens, 8):
        clock.step(f"block {step.index}", 0, 0)
    return {"seconds": PASSES * seconds, "layer": PASSES * clock.between("block 0", "block 1")}


def _sensitivity(model: Path, count: int) -> dict[str, float]:
    from ...jobs.model import prepare
    from ...measure.sensitivity import measure
    from ...measure.sensitivity_file import save_sensitivity

    job, tokens, clock = prepare(str(model)), _tokens(count), Clock()
    made = measure(job.source, job.inventory, tokens, "random", progress=clock.step, streamed=True)
    seconds = clock.seconds
    save_sensitivity(made, _kept(model, count))
    forward, back = ("block 0 forward", "block 1 forward"), ("block 1 back", "block 0 back")
    return {"seconds": seconds, "layer": clock.between(*forward) + clock.between(*back)}


def _kept(model: Path, count: int) -> Path:
    return model.parent / f"{model.name}-{count}.npz"


def _feedback(model: Path, count: int) -> dict[str, float]:
    from ...allocation.allocate import uniform
    from ...base.quant_config import QuantConfig
    from ...converters.output.write import Conversion, write
    from ...jobs.model import prepare
    from ...measure.sensitivity_file import load_sensitivity
    from ...rules.efforts import EFFORTS
    from ...runtime import runner

    runner.fits_here = lambda model_bytes: (
        False
    )  # so that two layers are streamed, as all of them are
    job, sensitivity = prepare(str(model)), load_sensitivity(_kept(model, count))
    plan = replace(
        uniform(job.source, job.inventory, QuantConfig(4, 64), {}),
        quantizer=EFFORTS["balanced"].quantizer,
    )
    last = [layer.path for layer in job.inventory.layers if layer.block == 1]
    after = next(layer.path for layer in job.inventory.layers if layer.role == "head")
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        clock = Clock()
        write(
            Conversion(
                job.source,
                job.inventory,
                plan,
                Path(folder) / "out",
                report=clock,
                sensitivity=sensitivity,
            )
        )
    return {"seconds": clock.seconds, "layer": clock.between(last[0], after)}


def _peer(model: Path, count: int) -> dict[str, float]:
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load_model

    clock = Clock()
    loaded, _ = load_model(model, lazy=True)
    loaded.set_dtype(mx.float32)
    mx.eval(loaded.parameters())
    gptq_quantize(loaded, mx.array(_tokens(count)), 4, 64, 4, 64)
    return {"seconds": clock.seconds}


if __name__ == "__main__":
    main()
