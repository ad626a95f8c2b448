"""Seconds of what looks at a model's own text, on a few layers of a model: one JSON line.

    python eval/bench/levels.py MODEL sensitivity|feedback|peer --tokens 2048

`sensitivity` walks through the model on random tokens, streamed as a model that doesn't fit in memory is; `feedback`
converts with error feedback (the second moments and the columns), beside `rtn` on the same plan; `peer` is mlx-lm's
`gptq_quantize` on the same tokens, with the model whole in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from mint_mlx.blas import use_fast_blas

use_fast_blas()

LENGTH = 256


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("what", choices=("sensitivity", "feedback", "peer"))
    parser.add_argument("--tokens", type=int, default=2048)
    asked = parser.parse_args()
    function = {"sensitivity": _sensitivity, "feedback": _feedback, "peer": _peer}[asked.what]
    print(json.dumps(function(asked.model, asked.tokens)))


def _tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (count // LENGTH, LENGTH)).astype(np.int32)


def _sensitivity(model: str, count: int) -> dict[str, float]:
    from mint_mlx.order import prepare
    from mint_mlx.sensitivity import measure

    job = prepare(model)
    started = time.monotonic()
    measure(job.source, job.inventory, _tokens(count), "random", streamed=True)
    return {"seconds": time.monotonic() - started}


def _feedback(model: str, count: int) -> dict[str, float]:
    from mint_mlx.allocate import uniform
    from mint_mlx.converters import checkpoint
    from mint_mlx.order import prepare
    from mint_mlx.quant import QuantConfig
    from mint_mlx.sensitivity import measure

    job, tokens, seconds = prepare(model), _tokens(count), {}
    plan = uniform(job.source, job.inventory, QuantConfig(4, 64), {})
    own = tokens, measure(job.source, job.inventory, tokens, "random", streamed=True)
    for name in ("rtn", "gptq"):
        with tempfile.TemporaryDirectory(dir=Path(model).parent) as folder:
            started = time.monotonic()
            checkpoint.write(job.source, job.inventory, replace(plan, quantizer=name), Path(folder) / "out", own=own)
            seconds[name] = time.monotonic() - started
    return {"seconds": seconds["gptq"] - seconds["rtn"], "rtn": seconds["rtn"]}


def _peer(model: str, count: int) -> dict[str, float]:
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load_model

    loaded, _ = load_model(Path(model), lazy=True)
    loaded.set_dtype(mx.float32)
    mx.eval(loaded.parameters())
    started = time.monotonic()
    gptq_quantize(loaded, mx.array(_tokens(count)), 4, 64, 4, 64)
    return {"seconds": time.monotonic() - started}


if __name__ == "__main__":
    main()
