#!/usr/bin/env bash
# What: compressed-tensors 0.18 packs 3, 5, 6 and 7 bits otherwise than 0.17, the first version that
#   compresses them: codes go across the ends of words, where a word held whole codes and had bits to
#   spare. Both call it `pack-quantized`; what tells them apart is the number of words, which
#   `decompress` doesn't look at. The new one returns noise of the right shape for weights that the
#   old one wrote. 2, 4 and 8 bits are the same.
# Guess before running: the new one finds too many words and raises. (transformers' from_pretrained
#   does refuse them.)
# Seen (compressed-tensors 0.17.1, 0.18.0 and 0.20.1, torch 2.13.0; 2026-11-30), which this script
#   checks with weights that each of them compresses and each decompresses: the error from what was
#   written is 0 or 1.4, as of other weights altogether. The old one returns too few columns for the
#   new layout. The old layout has 7 % more words at 3 and 6 bits, 14 % at 7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1
versions="0.17.1 0.18.0 0.20.1"
for version in $versions; do
    "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/$version" "compressed-tensors==$version"
done
cat > "$folder/look.py" <<'PY'
import sys

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

folder, todo, others = sys.argv[1], sys.argv[2], sys.argv[3:]
for bits in (2, 3, 4, 5, 6, 7, 8):
    settings = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=settings)
    if todo == "write":
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (64, 320), generator=torch.manual_seed(0))
        scale = torch.full((64, 10), 0.125)
        parts = {"weight_scale": scale, "weight_zero_point": torch.zeros_like(scale, dtype=torch.int8)}
        written = PackedQuantizationCompressor.compress({"weight": codes * 0.125, **parts}, scheme)
        torch.save((codes * 0.125, written), f"{folder}/{__version__}-{bits}.pt")
        continue
    row = []
    for other in others:
        weight, written = torch.load(f"{folder}/{other}-{bits}.pt")
        got = PackedQuantizationCompressor.decompress(written, scheme)["weight"].float()
        same = got.shape == weight.shape
        end = f"error {((got - weight).norm() / weight.norm()).item():.1f}" if same else f"{got.shape[1]} of 320 columns"
        row.append(f"{written['weight_packed'].shape[1]} words of {other} with {end}")
    print(f"{bits} bits, {__version__} reads {', '.join(row)}")
PY
for todo in write read; do
    for version in $versions; do
        PYTHONPATH="$folder/$version" "$folder/venv/bin/python" "$folder/look.py" "$folder" $todo $versions 2> "$folder/log" || { tail -n 5 "$folder/log"; exit 1; }
    done
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
2 bits, 0.17.1 reads 20 words of 0.17.1 with error 0.0, 20 words of 0.18.0 with error 0.0, 20 words of 0.20.1 with error 0.0
3 bits, 0.17.1 reads 32 words of 0.17.1 with error 0.0, 30 words of 0.18.0 with 300 of 320 columns, 30 words of 0.20.1 with 300 of 320 columns
4 bits, 0.17.1 reads 40 words of 0.17.1 with error 0.0, 40 words of 0.18.0 with error 0.0, 40 words of 0.20.1 with error 0.0
5 bits, 0.17.1 reads 54 words of 0.17.1 with error 0.0, 50 words of 0.18.0 with 300 of 320 columns, 50 words of 0.20.1 with 300 of 320 columns
6 bits, 0.17.1 reads 64 words of 0.17.1 with error 0.0, 60 words of 0.18.0 with 300 of 320 columns, 60 words of 0.20.1 with 300 of 320 columns
7 bits, 0.17.1 reads 80 words of 0.17.1 with error 0.0, 70 words of 0.18.0 with 280 of 320 columns, 70 words of 0.20.1 with 280 of 320 columns
8 bits, 0.17.1 reads 80 words of 0.17.1 with error 0.0, 80 words of 0.18.0 with error 0.0, 80 words of 0.20.1 with error 0.0
2 bits, 0.18.0 reads 20 words of 0.17.1 with error 0.0, 20 words of 0.18.0 with error 0.0, 20 words of 0.20.1 with error 0.0
3 bits, 0.18.0 reads 32 words of 0.17.1 with error 1.4, 30 words of 0.18.0 with error 0.0, 30 words of 0.20.1 with error 0.0
4 bits, 0.18.0 reads 40 words of 0.17.1 with error 0.0, 40 words of 0.18.0 with error 0.0, 40 words of 0.20.1 with error 0.0
5 bits, 0.18.0 reads 54 words of 0.17.1 with error 1.4, 50 words of 0.18.0 with error 0.0, 50 words of 0.20.1 with error 0.0
6 bits, 0.18.0 reads 64 words of 0.17.1 with error 1.4, 60 words of 0.18.0 with error 0.0, 60 words of 0.20.1 with error 0.0
7 bits, 0.18.0 reads 80 words of 0.17.1 with error 1.4, 70 words of 0.18.0 with error 0.0, 70 words of 0.20.1 with error 0.0
8 bits, 0.18.0 reads 80 words of 0.17.1 with error 0.0, 80 words of 0.18.0 with error 0.0, 80 words of 0.20.1 with error 0.0
2 bits, 0.20.1 reads 20 words of 0.17.1 with error 0.0, 20 words of 0.18.0 with error 0.0, 20 words of 0.20.1 with error 0.0
3 bits, 0.20.1 reads 32 words of 0.17.1 with error 1.4, 30 words of 0.18.0 with error 0.0, 30 words of 0.20.1 with error 0.0
4 bits, 0.20.1 reads 40 words of 0.17.1 with error 0.0, 40 words of 0.18.0 with error 0.0, 40 words of 0.20.1 with error 0.0
5 bits, 0.20.1 reads 54 words of 0.17.1 with error 1.4, 50 words of 0.18.0 with error 0.0, 50 words of 0.20.1 with error 0.0
6 bits, 0.20.1 reads 64 words of 0.17.1 with error 1.4, 60 words of 0.18.0 with error 0.0, 60 words of 0.20.1 with error 0.0
7 bits, 0.20.1 reads 80 words of 0.17.1 with error 1.4, 70 words of 0.18.0 with error 0.0, 70 words of 0.20.1 with error 0.0
8 bits, 0.20.1 reads 80 words of 0.17.1 with error 0.0, 80 words of 0.18.0 with error 0.0, 80 words of 0.20.1 with error 0.0
SEEN
