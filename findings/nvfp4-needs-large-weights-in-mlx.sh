#!/usr/bin/env bash
# What: mx.quantize's nvfp4 stores each group's scale in E4M3, whose normal numbers end at 1/64, and
#   without `global_scale` puts nothing before it. Weights as small as a model's lie below: their
#   scales are subnormal, with few digits, and at last 0.
# Guess before running: the relative error of normal weights is the same at every size.
# Seen (mlx 0.32.4 with mlx-cpu; 2026-11-30), which this script checks: normal weights of standard
#   deviation 0.02 have 10.3 % of error; of 0.01, 12.6 %, more than in mxfp4; of 0.003, 58 %; of
#   0.002, 96 %. With `global_scale`, which mlx-lm knows for experts alone, the guess holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4'
cat > "$folder/look.py" <<'PY'
import mlx.core as mx

mx.set_default_device(mx.cpu)
mx.random.seed(0)
normal = mx.random.normal((256, 1024))


def error(weights, mode, **options):
    packed = mx.quantize(weights, mode=mode, **options)
    back = mx.dequantize(*packed, mode=mode, dtype=mx.float32, **options)
    return (mx.linalg.norm(back - weights) / mx.linalg.norm(weights)).item()


for size in (1, 0.05, 0.02, 0.01, 0.005, 0.003, 0.002, 0.001):
    weights = normal * size
    whole = error(weights, "nvfp4", global_scale=weights.abs().max())
    print(
        f"{size}: nvfp4 {error(weights, 'nvfp4'):.3f}, with global_scale {whole:.3f}, "
        f"mxfp4 {error(weights, 'mxfp4'):.3f}"
    )
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
1: nvfp4 0.095, with global_scale 0.095, mxfp4 0.115
0.05: nvfp4 0.095, with global_scale 0.095, mxfp4 0.117
0.02: nvfp4 0.103, with global_scale 0.095, mxfp4 0.118
0.01: nvfp4 0.126, with global_scale 0.095, mxfp4 0.118
0.005: nvfp4 0.135, with global_scale 0.095, mxfp4 0.118
0.003: nvfp4 0.578, with global_scale 0.095, mxfp4 0.117
0.002: nvfp4 0.960, with global_scale 0.095, mxfp4 0.115
0.001: nvfp4 1.000, with global_scale 0.095, mxfp4 0.115
SEEN
