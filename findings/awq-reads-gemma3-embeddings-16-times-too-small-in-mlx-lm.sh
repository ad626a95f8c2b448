#!/bin/sh
# What: `mlx_lm.awq` runs a model block by block and begins with the embedding's rows. Gemma 3 multiplies
#   them by the square root of its width before the first block, which AWQ leaves out: the first block
#   is calibrated on a stream 34 (1B) to 73 (27B) times too small, and all later ones on a stream to
#   which the token itself adds next to nothing.
# Guess before running: AWQ's inputs of each block are those of the model, apart from the embedding's
#   rounding to 4 bits.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-12-01), which this script checks with a width of 256: the first
#   block's input is the model's divided by 16, and that of the third has a cosine of 0.7 with the
#   model's; for a Llama of the same sizes the norm is right and the cosine 0.99.
# Why it matters: Gemma 3 is in AWQ's list of supported models, the "loss reduction" that it prints is
#   measured on the same wrong inputs, and scales and clips are chosen by them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import sys

import mlx.core as mx
from mlx_lm.models import gemma3_text, llama
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

mx.set_default_device(mx.cpu)
print("mlx-lm", importlib.metadata.version("mlx-lm"), "mlx", mx.__version__)
SIZES = {
    "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256, "rms_norm_eps": 1e-6,
}
MODELS = {
    "llama": llama.Model(llama.ModelArgs(model_type="llama", **SIZES)),
    "gemma3_text": gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text", sliding_window=64, sliding_window_pattern=2, query_pre_attn_scalar=64, **SIZES
        )
    ),
}


def flat(x):
    return x.astype(mx.float32).flatten()


seen = {}
for name, model in MODELS.items():
    mx.random.seed(0)
    model.update({"model": {"embed_tokens": {"weight": mx.random.normal((256, 256)) / 16}}})
    tokens = mx.random.randint(0, 256, (8, 64))
    inputs = {}
    block = type(model.layers[0])
    inner = block.__call__

    def spy(self, x, *rest, inner=inner, **more):
        inputs.setdefault(id(self), x)  # the first call of a block
        return inner(self, x, *rest, **more)

    block.__call__ = spy
    model(tokens)
    order = [id(layer) for layer in model.layers]
    real = [inputs[key] for key in order]
    inputs.clear()
    awq_quantize(model, tokens, AWQ_MODEL_CONFIGS[name], group_size=64, bits=4, n_grid=2)
    block.__call__ = inner
    ratios, cosines = [], []
    for key, wanted in zip(order, real):
        a, b = flat(inputs[key]), flat(wanted)
        ratios.append((mx.linalg.norm(b) / mx.linalg.norm(a)).item())
        cosines.append(((a * b).sum() / mx.linalg.norm(a) / mx.linalg.norm(b)).item())
    seen[name] = ratios, cosines
    show = [" ".join(f"{x:.2f}" for x in row) for row in (ratios, cosines)]
    print(f"{name}: inputs of blocks, the model's over AWQ's: {show[0]}, cosine: {show[1]}")
ratios, cosines = seen["llama"]
if max(abs(r - 1) for r in ratios) > 0.1 or min(cosines) < 0.9:
    sys.exit("changed: AWQ's inputs of a Llama aren't the model's either")
ratios, cosines = seen["gemma3_text"]
if not (15 < ratios[0] < 17 and cosines[0] > 0.95 and cosines[2] < 0.8):
    sys.exit("changed: AWQ's first block of Gemma 3 no longer gets 1/16 of its input")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/log" || { tail -n 3 "$folder/log"; exit 1; }
