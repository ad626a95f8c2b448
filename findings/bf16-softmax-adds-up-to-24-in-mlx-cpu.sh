#!/usr/bin/env bash
# What: MLX's CPU adds up a softmax in the type of its input unless told `precise=True`; its doc says
#   that this can lose precision. In bfloat16 the sum stops growing once its terms are less than
#   half a step of it, so that the probabilities are all too large: over a vocabulary they add up to
#   as much as 24. A KL divergence that takes them grows with them, and the gradient is that of the
#   wrong ones. cumsum stops too, at 256 ones; sum, mean, logsumexp and cross_entropy are right.
# Guess before running: all of them add up in float32, as sum does; errors are below 1 %.
# Seen (mlx 0.32.4 with mlx-cpu, x86-64; 2026-11-30), which this script checks with normal logits of
#   deviation 1 (flat, as scores of attention are) and 3: over 512 they add up to 1.15 and 1.04, over
#   4096 to 2.5 and 1.2, over 151936 to 24 and 1.8, and the KL of two models is as many times too
#   large. In float16 those last two are 5.9 and 1.4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4'
cat > "$folder/look.py" <<'PY'
import mlx.core as mx
import mlx.nn as nn

mx.set_default_device(mx.cpu)
mx.random.seed(0)


def wide(array):
    return array.astype(mx.float32)


def divergence(one, other, softmax):
    one_log, other_log = (wide(a) - mx.logsumexp(wide(a), axis=-1, keepdims=True) for a in (one, other))
    return (softmax * (one_log - other_log)).sum(axis=-1).mean().item()


def steps(function, inputs):
    """The gradient's error, of its length in float32."""
    right = mx.grad(function)(wide(inputs))
    return (mx.linalg.norm(wide(mx.grad(function)(inputs)) - right) / mx.linalg.norm(right)).item()


for kind in (mx.bfloat16, mx.float16):
    for deviation in (1, 3):
        for size in (128, 512, 4096, 151936):
            logits = (mx.random.normal((4, size)) * deviation).astype(kind)
            others = (logits + mx.random.normal(logits.shape) * 0.1).astype(kind)
            plain, precise = (wide(mx.softmax(logits, axis=-1, precise=p)) for p in (False, True))
            ratio = divergence(logits, others, plain) / divergence(logits, others, precise)
            print(
                f"{str(kind).split('.')[-1]}, {size} of deviation {deviation}: they add up to "
                f"{plain.sum(axis=-1).mean().item():.2f}, precise {precise.sum(axis=-1).mean().item():.2f}, "
                f"KL times {ratio:.2f}"
            )

ones = mx.ones(4096, mx.bfloat16)
print("of 4096 ones: sum", ones.sum().item(), "mean", ones.mean().item(), "last of cumsum", ones.cumsum()[-1].item())
logits = mx.random.normal((4, 4096)).astype(mx.bfloat16)
print(f"logsumexp off by {mx.abs(wide(mx.logsumexp(logits, axis=-1)) - mx.logsumexp(wide(logits), axis=-1)).max().item():.2f}")
places = mx.arange(4096) / 4096
print(f"gradient of cross_entropy off by {steps(lambda a: nn.losses.cross_entropy(a, mx.arange(4)).sum(), logits):.2f}")
print(f"gradient of a softmax's mean place off by {steps(lambda a: (mx.softmax(a, axis=-1) * places).sum(), logits):.1f}")
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
bfloat16, 128 of deviation 1: they add up to 1.01, precise 1.00, KL times 1.01
bfloat16, 512 of deviation 1: they add up to 1.15, precise 1.00, KL times 1.15
bfloat16, 4096 of deviation 1: they add up to 2.52, precise 1.00, KL times 2.52
bfloat16, 151936 of deviation 1: they add up to 23.86, precise 1.00, KL times 23.86
bfloat16, 128 of deviation 3: they add up to 1.01, precise 1.00, KL times 1.01
bfloat16, 512 of deviation 3: they add up to 1.04, precise 1.00, KL times 1.04
bfloat16, 4096 of deviation 3: they add up to 1.17, precise 1.00, KL times 1.17
bfloat16, 151936 of deviation 3: they add up to 1.84, precise 1.00, KL times 1.84
float16, 128 of deviation 1: they add up to 1.00, precise 1.00, KL times 1.00
float16, 512 of deviation 1: they add up to 1.00, precise 1.00, KL times 1.00
float16, 4096 of deviation 1: they add up to 1.15, precise 1.00, KL times 1.15
float16, 151936 of deviation 1: they add up to 5.90, precise 1.00, KL times 5.90
float16, 128 of deviation 3: they add up to 1.00, precise 1.00, KL times 1.00
float16, 512 of deviation 3: they add up to 1.01, precise 1.00, KL times 1.01
float16, 4096 of deviation 3: they add up to 1.03, precise 1.00, KL times 1.03
float16, 151936 of deviation 3: they add up to 1.38, precise 1.00, KL times 1.38
of 4096 ones: sum 4096.0 mean 1.0 last of cumsum 256.0
logsumexp off by 0.03
gradient of cross_entropy off by 0.00
gradient of a softmax's mean place off by 6.4
SEEN
