#!/usr/bin/env bash
# What: GLM-4-9B (`model_type` glm) turns half of each head by position; its config leaves that out,
#   since 0.5 is transformers' default for the family. mlx-lm's class turns whole heads and knows no
#   `partial_rotary_factor`, whether the config states it or not: from the second token on it is
#   another model. Its class of the successor (glm4, GLM-4-0414) is right.
# Guess before running: the factor is read, but not where transformers 5 writes it (as with the theta).
# Seen (mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0, torch 2.13.0; 2026-11-30), which this script
#   checks: glm differs with the factor stated at either place and left out, and is the same only
#   where transformers turns whole heads too; glm4 is the same with a half stated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
tokens = np.arange(24)[None] * 7 % 96


def compare(family, factor, stated):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        pad_token_id=0, eos_token_id=2,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": factor},
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * 0.15)
        wanted = model(torch.from_numpy(tokens)).logits[0].numpy()
    folder = pathlib.Path(sys.argv[1]) / family
    model.save_pretrained(folder)
    table = json.loads((folder / "config.json").read_text())
    table["rope_theta"] = 10000.0
    if stated != "in rope_parameters":
        del table["rope_parameters"]
    if stated == "at the top":
        table["partial_rotary_factor"] = factor
    (folder / "config.json").write_text(json.dumps(table))
    # transformers takes the config that mlx-lm gets for the same model.
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        same = np.abs(again(torch.from_numpy(tokens)).logits[0].numpy() - wanted).max() < 1e-3
    off = np.abs(np.array(load_model(folder)[0](mx.array(tokens))[0]) - wanted).max(axis=-1) / wanted.std()
    print(
        f"{family}, {factor} {stated}: transformers {'same' if same else 'differs'}, mlx-lm's first token "
        f"{'same' if off[0] < 0.01 else 'differs'}, others {'same' if off.max() < 0.01 else 'differ' if off.max() > 1 else '?'}"
    )


for stated in ("in rope_parameters", "at the top", "left out"):
    compare("glm", 0.5, stated)
compare("glm", 1.0, "at the top")
compare("glm4", 0.5, "at the top")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/log" | tee "$folder/seen" || { tail -n 5 "$folder/log"; exit 1; }
diff "$folder/seen" - <<'SEEN'
glm, 0.5 in rope_parameters: transformers same, mlx-lm's first token same, others differ
glm, 0.5 at the top: transformers same, mlx-lm's first token same, others differ
glm, 0.5 left out: transformers same, mlx-lm's first token same, others differ
glm, 1.0 at the top: transformers same, mlx-lm's first token same, others same
glm4, 0.5 at the top: transformers same, mlx-lm's first token same, others same
SEEN
