#!/usr/bin/env bash
# What: MLX's CPU multiplies bfloat16 activations by affine weights with a sum that is bfloat16 too:
#   each of thousands of terms is added to a number of 8 bits. The error grows with the width and has
#   nothing to do with the weights' bits, so that 8 bits come out no better than 5. Whole matrices
#   are summed in float32, and mxfp4 has a fifth of the error. Activations of float32 have none of
#   it; the scales may stay bfloat16.
# Guess before running: all of them have the error of rounding the result, 0.2 %.
# Seen (mlx 0.32.4 with mlx-cpu, x86-64; 2026-11-30), which this script checks: with normal weights
#   and activations the product alone adds 3.7 % of error at a width of 1024, 7.5 % at 4096 and
#   14.6 % at 16384; that of a whole matrix .2 %. In all, 8-bit weights, of .8 % of error, give 7.5 %
#   at 4096, 5-bit ones 8.2 % in place of 4.5 %, 4-bit ones 11 % in place of 9 %. float16 is eight
#   times finer; experts (`gather_qmm`) are summed the same way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4'
cat > "$folder/look.py" <<'PY'
import mlx.core as mx

mx.set_default_device(mx.cpu)


def error(got, wanted):
    got, wanted = got.astype(mx.float32), wanted.astype(mx.float32)
    return f"{(mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted)).item():.3f}"


def data(width, kind):
    mx.random.seed(0)
    return (mx.random.normal((128, width)) * 0.02).astype(kind), mx.random.normal((16, width)).astype(kind)


print("the product's own error")
for kind in (mx.bfloat16, mx.float16):
    for width in (1024, 4096, 16384):
        weights, inputs = data(width, kind)
        wide = inputs.astype(mx.float32)
        row = [f"whole {error(inputs @ weights.T, wide @ weights.astype(mx.float32).T)}"]
        for mode, bits, group in (("affine", 4, 64), ("affine", 8, 64), ("mxfp4", 4, 32)):
            how = {"bits": bits, "group_size": group, "mode": mode}
            packed = mx.quantize(weights, **how)
            # The same weights, read exactly: scales of float32 give weights of float32.
            exact = [a.astype(mx.float32) if a.dtype == kind else a for a in packed]
            wanted = wide @ mx.dequantize(*exact, **how, dtype=mx.float32).T
            row.append(f"{mode} {bits} bits {error(mx.quantized_matmul(inputs, *packed, **how), wanted)}")
            if bits == 8:
                stacked = [a[None] for a in packed]
                which = mx.zeros(len(inputs), mx.uint32)
                got = mx.gather_qmm(inputs[:, None], *stacked, rhs_indices=which, **how)[:, 0]
                row.append(f"an expert of it {error(got, wanted)}")
                row.append(f"of float32 inputs {error(mx.quantized_matmul(wide, *packed, **how), wanted)}")
        print(f"{str(kind).split('.')[-1]}, {width} wide: {', '.join(row)}")

print("all of the error, bfloat16, 4096 wide")
weights, inputs = data(4096, mx.bfloat16)
wanted = inputs.astype(mx.float32) @ weights.astype(mx.float32).T
for bits in (2, 3, 4, 5, 6, 8):
    packed = mx.quantize(weights, 64, bits)
    product = mx.quantized_matmul(inputs, *packed, group_size=64, bits=bits)
    unpacked = inputs @ mx.dequantize(*packed, 64, bits).T
    print(f"{bits} bits: {error(product, wanted)}, unpacked first {error(unpacked, wanted)}")
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
the product's own error
bfloat16, 1024 wide: whole 0.002, affine 4 bits 0.035, affine 8 bits 0.037, an expert of it 0.037, of float32 inputs 0.000, mxfp4 4 bits 0.010
bfloat16, 4096 wide: whole 0.002, affine 4 bits 0.069, affine 8 bits 0.075, an expert of it 0.075, of float32 inputs 0.000, mxfp4 4 bits 0.015
bfloat16, 16384 wide: whole 0.002, affine 4 bits 0.142, affine 8 bits 0.146, an expert of it 0.146, of float32 inputs 0.000, mxfp4 4 bits 0.029
float16, 1024 wide: whole 0.000, affine 4 bits 0.004, affine 8 bits 0.005, an expert of it 0.005, of float32 inputs 0.000, mxfp4 4 bits 0.001
float16, 4096 wide: whole 0.000, affine 4 bits 0.009, affine 8 bits 0.009, an expert of it 0.009, of float32 inputs 0.000, mxfp4 4 bits 0.002
float16, 16384 wide: whole 0.000, affine 4 bits 0.018, affine 8 bits 0.018, an expert of it 0.018, of float32 inputs 0.000, mxfp4 4 bits 0.003
all of the error, bfloat16, 4096 wide
2 bits: 0.400, unpacked first 0.394
3 bits: 0.197, unpacked first 0.188
4 bits: 0.113, unpacked first 0.090
5 bits: 0.082, unpacked first 0.045
6 bits: 0.076, unpacked first 0.022
8 bits: 0.075, unpacked first 0.008
SEEN
