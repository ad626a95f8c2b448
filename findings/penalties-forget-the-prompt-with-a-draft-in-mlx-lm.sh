#!/bin/sh
# What: with a draft model mlx-lm applies repetition, presence and frequency penalties to what has been
#   generated and the prompt's last token; without one to the prompt as well. Speculative decoding
#   reads the prompt into its caches without keeping its tokens for the processors, which
#   `generate_step` does. So a draft, which should change nothing but the speed, changes the text.
# Guess before running: greedy tokens with a draft are those without, with any processors, as they are
#   without penalties.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-12-01), which this script checks: with eight random models and
#   one prompt each, a repetition, a presence or a frequency penalty gives another text in 8 of 8 cases,
#   the draft being the model itself; none does without penalties. It is the text that the model
#   alone gives if its processors don't see the prompt's other tokens.
# Why it matters: the server applies penalties of a request the same way, so that starting it with
#   `--draft-model` changes replies; a summary or a translation repeats its prompt freely.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_logits_processors

mx.set_default_device(mx.cpu)
print("mlx-lm", importlib.metadata.version("mlx-lm"), "mlx", mx.__version__)
SIZES = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 32,
    "tie_word_embeddings": False,
}
LENGTH, NEW = 12, 24


def triple(_, layer):
    if isinstance(layer, nn.Linear):
        layer.weight = layer.weight * 3


def without_prompt(processor):
    return lambda tokens, logits: processor(tokens[LENGTH - 1 :], logits)


seen = {}
for seed in range(8):
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs(**SIZES))
    model.apply_to_modules(triple)
    prompt = mx.random.randint(0, 32, (LENGTH,))
    for penalty in ({}, {"repetition_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.0}):
        def processors(penalty=penalty):
            sizes = {f"{name.removesuffix('_penalty')}_context_size": 100 for name in penalty}
            return make_logits_processors(**penalty, **sizes)

        def alone(some, model=model, prompt=prompt):
            return [t for t, _ in generate_step(prompt, model, max_tokens=NEW, logits_processors=some)]

        drafted = [
            token
            for token, _, _ in speculative_generate_step(
                prompt, model, model, max_tokens=NEW, logits_processors=processors()
            )
        ]
        name = next(iter(penalty), "no penalty")
        counts = seen.setdefault(name, [0, 0])
        counts[0] += drafted == alone(processors())
        counts[1] += drafted == alone([without_prompt(p) for p in processors()])
for name, (same, blind) in seen.items():
    print(f"{name}: text with a draft is that without in {same} of 8, that without the prompt in {blind} of 8")
wanted = {"no penalty": [8, 8]} | {f"{n}_penalty": [0, 8] for n in ("repetition", "presence", "frequency")}
if seen != wanted:
    sys.exit("changed: with a draft, penalties no longer leave out just the prompt")
PY
"$folder/venv/bin/python" "$folder/look.py"
