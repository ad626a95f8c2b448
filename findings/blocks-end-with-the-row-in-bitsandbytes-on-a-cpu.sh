#!/usr/bin/env bash
# What: bitsandbytes' 4 bits have a scale for each 64 (or 128) numbers in the order in which they lie,
#   also across the ends of rows. On a CPU with AVX-512 it restores them as if blocks ended with each
#   row: where rows are no whole number of blocks, weights get their neighbours' scales, in silence,
#   and `Linear4bit` multiplies with those. Files are right, and so is a GPU.
# Expected (the guess, written before it was run): what is restored is the codes times their scales,
#   as on a GPU.
# Seen (bitsandbytes 0.50.2, torch 2.14.1; 2026-12-01, a CPU with AVX-512), which this script checks:
#   normal weights have 9 % of error; rows of 2,880 in blocks of 128 (gpt-oss' width) have 22 %,
#   rows of 96 in blocks of 64 have 25 %; rows of 2,880 in blocks of 64 are right. The same codes and
#   scales multiplied by hand have 9 to 10 % each time. The outputs of a layer of 96 inputs whose rows
#   differ in size tenfold have 81 %. (Without AVX-512 another path is taken, which was not looked at.)
set -euo pipefail
if ! grep -q avx512bw /proc/cpuinfo; then
  echo "this CPU has no AVX-512: nothing to see here"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 bitsandbytes==0.50.2 numpy
cat > "$folder/look.py" <<'PY'
import bitsandbytes
import torch
from bitsandbytes import functional


def error(weight, restored):
    return float((weight - restored).norm() / weight.norm())


def both(weight, block):
    """The error as bitsandbytes restores a weight, and as its codes times their scales."""
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    pairs = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten().long()
    by_hand = state.code[pairs].reshape(-1, block) * state.absmax[:, None]
    restored = functional.dequantize_4bit(codes, state)
    return error(weight, restored), error(weight, by_hand.reshape(weight.shape))


torch.manual_seed(0)
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
seen = {}
for columns, block in ((2880, 64), (2880, 128), (96, 64)):
    seen[columns, block] = both(torch.randn(64, columns), block)
    print(f"rows of {columns} in blocks of {block}: error {seen[columns, block][0]:.1%} as restored, "
          f"{seen[columns, block][1]:.1%} by hand")

weight = torch.randn(64, 96) * torch.logspace(-1, 0, 64)[torch.randperm(64)][:, None]
layer = bitsandbytes.nn.Linear4bit(96, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
layer = layer.to("cpu")
x = torch.randn(256, 96)
off = error(x @ weight.T, layer(x))
print(f"a layer of rows of 96 that differ in size: error {off:.0%}")

assert all(0.08 < hand < 0.11 for _, hand in seen.values()), seen
assert abs(seen[2880, 64][0] - seen[2880, 64][1]) < 0.001, seen
assert seen[2880, 128][0] > 0.18 and seen[96, 64][0] > 0.24, seen
assert off > 0.3, off
print("as described")
PY
"$folder/venv/bin/python" "$folder/look.py" 2>&1 | grep -v "^Failed to load"
