"""Runs GPTQModel, by the interpreter that has it: `python run_gptqmodel.py JSON`.

It imports nothing of mint-mlx. The object has `source` and `out` (folders), `tokens` (a .npy file,
int (windows, tokens)), `bits` and `group_size`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np


def run(asked: dict[str, Any]) -> None:
    """Quantize the source by GPTQ on the CPU and write the checkpoint."""
    # Its loader wants two workers, of which it makes one itself where there are two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = np.load(asked["tokens"])
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    config = QuantizeConfig(bits=asked["bits"], group_size=asked["group_size"], device="cpu")
    model = GPTQModel.load(asked["source"], config)
    model.quantize(data, batch_size=8)
    model.save(asked["out"])


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
