#!/usr/bin/env bash
# What: on MLX's CPU backend, mx.quantize in the modes mxfp4 and mxfp8 turns a group whose largest
#   weight is tiny (an expert that was never trained, a row that decays to nothing) into huge or
#   infinite numbers: the exponent of its shared scale is below what its byte can hold, and the byte
#   wraps around. All finite numbers in, nothing said. nvfp4 gives 0, as one would expect.
# Guess before running: both wrap where weights leave float32's normal numbers, below 1.2e-38.
# Seen (mlx 0.32.4 with mlx-cpu, x86-64; 2026-11-29), which this script checks: mxfp4 does there, but
#   mxfp8 wraps below about 1.4e-36 already: its largest code is 448, so its scales are smaller.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4'
cat > "$folder/look.py" <<'PY'
import mlx.core as mx

mx.set_default_device(mx.cpu)
for mode in ("mxfp4", "mxfp8", "nvfp4"):
    for value in (3e-36, 1e-36, 3e-38, 1e-38, 2e-39):
        packed = mx.quantize(mx.full((1, 32), value), mode=mode)
        print(f"{mode} {value:g} -> {mx.dequantize(*packed, mode=mode)[0, 0].item():.2g}")
PY
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
mxfp4 3e-36 -> 3e-36
mxfp4 1e-36 -> 1.1e-36
mxfp4 3e-38 -> 3.5e-38
mxfp4 1e-38 -> inf
mxfp4 2e-39 -> 2.6e+38
mxfp8 3e-36 -> 3e-36
mxfp8 1e-36 -> inf
mxfp8 3e-38 -> inf
mxfp8 1e-38 -> inf
mxfp8 2e-39 -> 2.3e+38
nvfp4 3e-36 -> 0
nvfp4 1e-36 -> 0
nvfp4 3e-38 -> 0
nvfp4 1e-38 -> 0
nvfp4 2e-39 -> 0
SEEN
