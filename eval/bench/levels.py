"""Time of each step of `balanced` on two layers of a model, as one JSON line, in seconds.

    python eval/bench/levels.py MODEL text|sensitivity|feedback|peer --tokens 2048

text         writing the model's own text (four passes)
sensitivity  measuring what errors cost on that many tokens
feedback     converting with error feedback, on the sensitivity that `sensitivity` saved beside the
             model
peer         mlx-lm's `gptq_quantize` on the same tokens, with the whole model in memory

The model is streamed, as one that doesn't fit in memory is. `layer` is the share of the last block;
the rest of `seconds` is the first block, the embedding and the head.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from mint_mlx.base.blas import use_fast_blas
from mint_mlx.base.folders import UNMARKED
from mint_mlx.base.remove import Kind
from mint_mlx.base.report import Silent
from mint_mlx.base.scratch import scratch_folder

use_fast_blas()  # before anything imports mlx

LENGTH = 256  # tokens a window


def main() -> None:
    """Parse the command line, measure, print."""
    steps = {"text": _text, "sensitivity": _sensitivity, "feedback": _feedback, "peer": _peer}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("step", choices=steps)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    print(json.dumps(steps[options.step](options.model, options.tokens)))


class Clock(Silent):
    """A report that remembers when each item was first reported."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.start = time.monotonic()

    def step(self, what: str, done: int, total: int) -> None:
        self.times.setdefault(what, time.monotonic())

    def between(self, first: str, last: str) -> float:
        return self.times[last] - self.times[first]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def _tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (count // LENGTH, LENGTH)).astype(np.int32)


def _text(model: Path, count: int) -> dict[str, float]:
    from mint_mlx.measure.self_text import PASSES, resample
    from mint_mlx.runtime.blocks import forward_blocks
    from mint_mlx.runtime.draws import uniform_numbers
    from mint_mlx.runtime.runner import load_runner

    tokens = _tokens(count)
    clock = Clock()
    resample(load_runner(model, True), tokens, uniform_numbers("text", 0, tokens.shape))
    seconds = clock.seconds

    # Once more block by block, for the share of the last one.
    clock = Clock()
    for step, _, _ in forward_blocks(load_runner(model, True), tokens, 8):
        clock.step(f"block {step.index}", 0, 0)
    return {"seconds": PASSES * seconds, "layer": PASSES * clock.between("block 0", "block 1")}


def _sensitivity(model: Path, count: int) -> dict[str, float]:
    from mint_mlx.jobs.model import prepare
    from mint_mlx.measure.fisher import measure
    from mint_mlx.measure.sensitivity_file import save_sensitivity
    from mint_mlx.measure.text import Text

    job = prepare(str(model))
    clock = Clock()
    sensitivity = measure(
        job.source, job.inventory, Text(_tokens(count)), progress=clock.step, streamed=True
    )
    seconds = clock.seconds
    save_sensitivity(sensitivity, _sensitivity_file(model, count))

    forward = clock.between("block 0 forward", "block 1 forward")
    back = clock.between("block 1 back", "block 0 back")
    return {"seconds": seconds, "layer": forward + back}


def _sensitivity_file(model: Path, count: int) -> Path:
    return model.parent / f"{model.name}-{count}.npz"


def _feedback(model: Path, count: int) -> dict[str, float]:
    from mint_mlx.allocation.allocate import uniform
    from mint_mlx.base.quant_config import QuantConfig
    from mint_mlx.converters.output.conversion import Conversion
    from mint_mlx.converters.output.write import write
    from mint_mlx.jobs.model import prepare
    from mint_mlx.measure.sensitivity_file import load_sensitivity
    from mint_mlx.rules.efforts import EFFORTS
    from mint_mlx.runtime import runner

    # Two layers are streamed then, as all of them are.
    runner.fits_here = lambda model_bytes: False

    job = prepare(str(model))
    sensitivity = load_sensitivity(_sensitivity_file(model, count))
    plan = uniform(job.source, job.inventory, QuantConfig(4, 64), {})
    plan = replace(plan, quantizer=EFFORTS["balanced"].quantizer)
    kind = Kind("a folder", (), {"out": UNMARKED, "out.partial": UNMARKED})
    with scratch_folder(kind, model.parent) as folder:
        clock = Clock()
        conversion = Conversion(
            job.source,
            job.inventory,
            plan,
            folder / "out",
            report=clock,
            sensitivity=sensitivity,
        )
        write(conversion)
        seconds = clock.seconds

    # From the first layer of the last block to the head.
    last_block = next(layer.path for layer in job.inventory.layers if layer.block == 1)
    head = next(layer.path for layer in job.inventory.layers if layer.role == "head")
    return {"seconds": seconds, "layer": clock.between(last_block, head)}


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
