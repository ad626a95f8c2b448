#!/bin/sh
# What: mx.quantize makes codes from scales of float32 and rounds the scales to the weights' type after
#   that. In bfloat16 a scale is then off by up to 0.2 %, which at the 255th step is half a step, and
#   nobody makes the codes anew. mx.dequantize multiplies and adds in bfloat16 as well, where code x
#   scale is rounded at the size of the group's range before the bias takes most of it away. Both
#   matter at 8 bits: together they are more than the rounding to 256 steps itself.
# Guess before running: codes belong to the scales that are stored, and bfloat16, which the weights had
#   before, costs nothing that one sees.
# Seen (mlx 0.32.4 with mlx-cpu, x86-64; 2026-12-01), which this script checks with normal weights in
#   bfloat16 in groups of 64: 8 bits have 0.67 % of error, 0.54 % with codes made anew for the very
#   scales and biases that are stored, as much as float16 has or float32; read with mx.dequantize it is
#   0.83 %. In groups of 32 it is 0.62, 0.48 and 0.77 %, so that halving the groups gains nearly
#   nothing. Codes are those of float32, all of them. At 6 bits the two cost 4 %, at 4 bits nothing.
# Why it matters: an "8 bit" bfloat16 model has half as much error again as its size allows, and a
#   comparison of formats at 8 bits (or of group sizes) measures bfloat16.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4'
cat > "$folder/look.py" <<'PY'
import sys

import mlx.core as mx

mx.set_default_device(mx.cpu)
print("mlx", mx.__version__)
WIDE = mx.float32


def error(got, wanted):
    return (mx.linalg.norm(got.astype(WIDE) - wanted) / mx.linalg.norm(wanted)).item()


def anew(weights, scales, biases, group, bits):
    """The weights by the best codes for scales and biases as stored."""
    rows = weights.reshape(len(weights), -1, group)
    scales, biases = scales.astype(WIDE)[..., None], biases.astype(WIDE)[..., None]
    codes = mx.clip(mx.round((rows - biases) / scales), 0, 2**bits - 1)
    return (codes * scales + biases).reshape(weights.shape)


seen = {}
for kind in (mx.bfloat16, mx.float16):
    for group, bits in ((64, 8), (32, 8), (64, 6), (64, 4)):
        mx.random.seed(0)
        weights = (mx.random.normal((256, 1024)) * 0.02).astype(kind)
        exact = weights.astype(WIDE)
        codes, scales, biases = mx.quantize(weights, group, bits)
        stored = mx.dequantize(codes, scales.astype(WIDE), biases.astype(WIDE), group, bits)
        wide = mx.quantize(exact, group, bits)
        row = {
            "as stored": error(stored, exact),
            "codes made anew": error(anew(exact, scales, biases, group, bits), exact),
            "float32 throughout": error(mx.dequantize(*wide, group, bits), exact),
            "by mx.dequantize": error(mx.dequantize(codes, scales, biases, group, bits), exact),
        }
        same = mx.all(wide[0] == codes).item()
        seen[kind, group, bits] = row, same
        name = str(kind).split(".")[-1]
        print(f"{name}, {bits} bits, groups of {group}:", ", ".join(f"{k} {v:.4%}" for k, v in row.items()), f"; codes of float32 {same}")
for group in (64, 32):
    row, same = seen[mx.bfloat16, group, 8]
    if not same or row["as stored"] < 1.2 * row["codes made anew"]:
        sys.exit("changed: codes of 8 bits are made for the scales as stored")
    if row["codes made anew"] > 1.03 * row["float32 throughout"]:
        sys.exit("changed: bfloat16 scales cost more than late rounding")
    if row["by mx.dequantize"] < 1.15 * row["as stored"]:
        sys.exit("changed: mx.dequantize no longer adds in bfloat16")
row, _ = seen[mx.float16, 64, 8]
if row["by mx.dequantize"] > 1.05 * row["float32 throughout"]:
    sys.exit("changed: float16 has the error of bfloat16")
PY
"$folder/venv/bin/python" "$folder/look.py"
