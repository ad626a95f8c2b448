"""Runs AutoRound, by the interpreter that has it: `python run_auto_round.py JSON`.

It imports nothing of mint-mlx. The object has `source` and `out` (folders), `tokens` (a .npy file,
int (windows, tokens)), `iterations`, `group_size`, and either `bits` or `average`, the bits a
weight that AutoScheme distributes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

CHOICES = (2, 3, 4, 5, 6, 8)  # bits that AutoScheme gives to layers


def run(asked: dict[str, Any]) -> None:
    """Quantize the source and write the export."""
    from auto_round import AutoRound, AutoScheme
    from transformers import AutoTokenizer

    # AutoScheme takes a file of texts only, and leaves out those shorter than a window: two windows
    # each, of which it cuts off the end.
    tokenizer = AutoTokenizer.from_pretrained(asked["source"])
    windows = np.load(asked["tokens"])
    texts = [
        tokenizer.decode(pair.reshape(-1).tolist())
        for pair in np.array_split(windows, len(windows) // 2)
    ]
    file = Path(asked["tokens"]).with_suffix(".json")
    file.write_text(json.dumps(texts), encoding="utf-8")

    group = asked["group_size"]
    settings: dict[str, Any] = {"scheme": f"W{asked['bits']}A16", "group_size": group, "sym": False}
    if asked["average"] is not None:
        size = "" if group == 128 else f"G{group}"
        options = [f"W{bits}A16{size}" for bits in CHOICES]
        settings = {"scheme": AutoScheme(avg_bits=asked["average"], options=options)}
    quantizer = AutoRound(
        asked["source"],
        tokenizer,
        iters=asked["iterations"],
        dataset=str(file),
        nsamples=len(texts),
        seqlen=windows.shape[1],
        device_map="cpu",
        enable_torch_compile=False,  # compiling takes longer than it saves on small models
        quant_lm_head=True,
        **settings,
    )
    quantizer.quantize_and_save(asked["out"], format="mlx")


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
