#!/usr/bin/env bash
# What: mx.load of a GGUF file returns bfloat16 tensors as float16, so that what is over 65504 becomes
#   infinite and what is under 3e-8 becomes 0; and it ends at the first tensor of a type that it
#   doesn't know, such as the MXFP4 of gpt-oss, dropping that one and all that follow. No word in
#   either case, while types that it knows but can't decode (Q5_0) raise an error.
# Guess before running: BF16 gives bfloat16, and unknown types raise.
# Seen (mlx 0.32.4, gguf 0.19.0; 2026-11-30), which this script checks: 1e5 and -3e38
#   come back as infinities, and 1e-9 as 0; of three tensors one is read where the second is MXFP4,
#   TQ1_0 or TQ2_0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' gguf==0.19.0
cat > "$folder/look.py" <<'PY'
import sys

import gguf
import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
file = f"{sys.argv[1]}/tensors.gguf"


def write(*tensors):
    writer = gguf.GGUFWriter(file, "llama")
    for name, array, kind in tensors:
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


wide = np.array([[1.0, 1e5, -3e38, 1e-9] * 8], np.float32)
write(("wide", wide, "BF16"))
array = mx.load(file)["wide"]
print("BF16 is read as", array.dtype, array[0, :4].tolist())
mx.save_safetensors(f"{sys.argv[1]}/wide.safetensors", {"wide": mx.array(wide).astype(mx.bfloat16)})
print("from safetensors", mx.load(f"{sys.argv[1]}/wide.safetensors")["wide"].dtype)

ones = np.ones((2, 256), np.float32)
for kind in ("Q4_0", "Q5_0", "MXFP4", "TQ1_0", "TQ2_0"):
    write(("first", ones, "F32"), ("second", ones, kind), ("third", ones, "F32"))
    reader = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    try:
        names = sorted(name for name in mx.load(file) if "." not in name)
    except RuntimeError:
        names = "an error"
    print(kind, "second of", len(reader), "tensors:", names)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
BF16 is read as mlx.core.float16 [1.0, inf, -inf, 0.0]
from safetensors mlx.core.bfloat16
Q4_0 second of 3 tensors: ['first', 'second', 'third']
Q5_0 second of 3 tensors: an error
MXFP4 second of 3 tensors: ['first']
TQ1_0 second of 3 tensors: ['first']
TQ2_0 second of 3 tensors: ['first']
SEEN
