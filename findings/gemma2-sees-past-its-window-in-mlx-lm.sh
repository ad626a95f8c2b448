#!/usr/bin/env bash
# What: every other layer of Gemma 2 sees the last 4096 tokens alone. mlx-lm's class doesn't read the
#   window and lets all layers see everything, whether called at once, with its cache or token by
#   token: from token 4096 to its 8192nd it is another model. Phi-3-mini-4k from token 2047 and
#   StarCoder2 and Mistral 7B v0.1 from token 4096, whose layers all have a window, are run so too.
#   Gemma 3, Cohere 2 and EXAONE 4 have their windows. Nothing is said.
# Guess before running: Gemma 2 has them, as the others whose layers alternate. (That the families
#   with a window in every layer go without was guessed.)
# Seen (mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0, torch 2.13.0; 2026-11-30), which this script
#   checks with windows of 8: the tokens inside the window have transformers' logits, those after it
#   are off by more than a deviation.
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
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
FAMILIES = {
    "gemma2": {},
    "phi3": {},
    "starcoder2": {},
    "mistral": {},
    "gemma3_text": {"sliding_window_pattern": 4, "layer_types": SLIDING},
    "cohere2": {"sliding_window_pattern": 4, "layer_types": SLIDING},
    "exaone4": {"sliding_window_pattern": "LLLG", "layer_types": SLIDING},
}
WINDOW = 8
tokens = np.arange(3 * WINDOW)[None] * 7 % 96


def checkpoint(family, more):
    """Written by transformers, with its logits; keys that mlx-lm reads elsewhere are put there."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        sliding_window=WINDOW, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * (0.3 if "q_proj" in name or "k_proj" in name else 0.1))
        logits = model(torch.from_numpy(tokens)).logits[0].numpy()
    folder = pathlib.Path(sys.argv[1]) / family
    model.save_pretrained(folder)
    table = json.loads((folder / "config.json").read_text())
    rope = table["rope_parameters"]
    rope = rope.get("full_attention") or rope.get("sliding_attention") or rope
    table = {"rope_scaling": None, "rope_theta": rope["rope_theta"], **table, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(table))
    return folder, logits


for family, more in FAMILIES.items():
    folder, wanted = checkpoint(family, more)
    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    steps = [model(mx.array(tokens[:, i : i + 1]), cache=cache)[0] for i in range(tokens.shape[1])]
    calls = {
        "at once": model(mx.array(tokens))[0],
        "with a cache": model(mx.array(tokens), cache=make_prompt_cache(model))[0],
        "by token": mx.concatenate(steps),
    }
    row = []
    for name, got in calls.items():
        off = np.abs(np.array(got) - wanted).max(axis=-1) / wanted.std()
        parts = (off[:WINDOW].max(), off[WINDOW:].max())
        row.append(f"{name} {', then '.join('differs' if o > 1 else 'same' if o < 0.01 else f'? {o}' for o in parts)}")
    print(f"{family}: {'; '.join(row)}")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/log" | tee "$folder/seen" || { tail -n 5 "$folder/log"; exit 1; }
diff "$folder/seen" - <<'SEEN'
gemma2: at once same, then differs; with a cache same, then differs; by token same, then differs
phi3: at once same, then differs; with a cache same, then differs; by token same, then differs
starcoder2: at once same, then differs; with a cache same, then differs; by token same, then differs
mistral: at once same, then differs; with a cache same, then differs; by token same, then differs
gemma3_text: at once same, then same; with a cache same, then same; by token same, then same
cohere2: at once same, then same; with a cache same, then same; by token same, then same
exaone4: at once same, then same; with a cache same, then same; by token same, then same
SEEN
