#!/bin/sh
# What: `--max-kv-size N` of mlx-lm keeps the prompt's first 4 tokens in the cache, as attention sinks,
#   besides the latest ones. But the mask with which several tokens are read at once is a sliding
#   window of N positions of that cache: of a prompt that is longer than N no token past the first N
#   sees them. They come back with the first generated token. And in Llama, Mistral and 54 other
#   classes, which make caches of their own, the option does nothing at all.
# Guess before running: the kept tokens are seen by all later ones, so that reading the prompt at once
#   or token by token is the same; and Llama honours the option.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-12-01), which this script checks: with N = 16 the last of 40
#   tokens sees 24 to 39 if all are read at once and 0 to 3 and 28 to 39 if one by one; in chunks of 4
#   it sees part of them. The next token sees 0 to 3 in any case. In a random Qwen3 logits of the
#   prompt's end differ by more than their own spread. make_prompt_cache gives a Llama plain caches.
# Why it matters: without its sinks a model's text falls apart, which is what the kept tokens are for;
#   a prompt's processing is the part that lacks them. And a Llama's memory grows without bound.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import sys

import mlx.core as mx
from mlx_lm.models import llama, qwen3
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache

mx.set_default_device(mx.cpu)
print("mlx-lm", importlib.metadata.version("mlx-lm"), "mlx", mx.__version__)
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "rope_theta": 1e4,
}
mx.random.seed(0)
model = qwen3.Model(qwen3.ModelArgs(model_type="qwen3", head_dim=16, **SIZES))
KEPT, MOST, LENGTH = 4, 16, 40


def attended(step):
    """Positions that the last token of a prompt sees, and the first one after it."""
    cache = make_prompt_cache(model, MOST)[0]
    lasts = []
    for start, stop in [(i, min(i + step, LENGTH)) for i in range(0, LENGTH, step)] + [(LENGTH, LENGTH + 1)]:
        positions = mx.arange(start, stop, dtype=mx.float32)[None, None, :, None]
        hidden = mx.zeros((1, stop - start, 64))
        mask = create_attention_mask(hidden, cache, return_array=stop - start > 1)
        keys, _ = cache.update_and_fetch(positions, positions)
        seen = keys.flatten().tolist()
        if mask is not None:
            seen = [p for p, visible in zip(seen, mask[..., -1, :].flatten().tolist()) if visible]
        lasts.append(sorted(int(p) for p in seen))
    return lasts[-2:]


def short(positions):
    runs = []
    for p in positions:
        if runs and p == runs[-1][1] + 1:
            runs[-1][1] = p
        else:
            runs.append([p, p])
    return ", ".join(f"{a} to {b}" for a, b in runs)


def last_logits(step):
    cache, tokens = make_prompt_cache(model, MOST), mx.random.randint(0, 64, (1, LENGTH), key=mx.random.key(1))
    for start in range(0, LENGTH, step):
        logits = model(tokens[:, start : start + step], cache=cache)
    return logits[0, -1]


kept, sinks, single = set(range(KEPT)), {}, last_logits(1)
for step in (1, 4, LENGTH):
    prompt, after = attended(step)
    apart = (mx.abs(last_logits(step) - single).max() / mx.std(single)).item()
    sinks[step] = len(kept & set(prompt))
    print(
        f"in steps of {step}: the prompt's last token sees {short(prompt)}; the next one {short(after)}; "
        f"logits differ from one by one by {apart:.2f} of their spread"
    )
    if not kept <= set(after):
        sys.exit("changed: generated tokens no longer see the kept ones")
    if step == LENGTH and apart < 0.5:
        sys.exit("changed: logits are those of one by one")
if sinks[1] != KEPT or sinks[LENGTH] != 0 or sinks[4] == KEPT:
    sys.exit(f"changed: of {KEPT} kept tokens a prompt's last one sees {sinks}")
caches = {type(c).__name__ for c in make_prompt_cache(llama.Model(llama.ModelArgs(model_type="llama", **SIZES)), MOST)}
print("a Llama's caches:", *caches)
if caches != {"KVCache"}:
    sys.exit("changed: Llama's caches now have a largest size")
PY
"$folder/venv/bin/python" "$folder/look.py"
