#!/usr/bin/env bash
# What: compressed-tensors decides by bits, type and group alone that a scheme is MXFP4. One of 4-bit
#   floats in groups of 32 whose scales are numbers, in which it simulates the model, is compressed
#   to `mxfp4-pack-quantized`: each scale becomes the power of two below it, and the largest weights
#   of a group are clipped. Also where `scale_dtype` says bfloat16. In groups of 64 it refuses.
# Expected: the scales are stored as the scheme says, or the scheme is refused.
# Seen (compressed-tensors 0.19.0, transformers 5.24.0, torch 2.13.0; 2026-12-01), which this script
#   checks: normal weights have 10 % of error as simulated, and 32 % as compressed and loaded again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet compressed-tensors==0.19.0 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

CONFIG = transformers.LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)


def look(group, **scales):
    """The error of a layer as it is simulated, and as it is compressed and loaded again."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG).to(torch.bfloat16)
    floats = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=group, **scales)
    scheme = QuantizationScheme(targets=["Linear"], weights=floats)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().float().reshape(len(module.weight), -1, group)
            module.weight_scale.data = (groups.abs().amax(-1) / 6).to(module.weight_scale.dtype)

    layer = model.model.layers[0].mlp.up_proj
    exact = layer.weight.detach().float()
    simulated = fake_quantize(layer.weight.detach(), layer.weight_scale, layer.weight_zero_point, floats).float()
    try:
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
    except Exception as error:
        return f"simulated {error_of(simulated, exact)}, compressed: {type(error).__name__}"
    form = compressor.quantization_config.format
    compressor.decompress_model(model)
    loaded = layer.weight.detach().float()
    return f"simulated {error_of(simulated, exact)}, as {getattr(form, 'value', form)} {error_of(loaded, exact)}"


def error_of(weight, exact):
    return f"{float((weight - exact).norm() / exact.norm()):.2f}"


print("no scale_dtype:", look(32))
print("scales in bfloat16:", look(32, scale_dtype=torch.bfloat16))
print("groups of 64:", look(64))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/errors" > "$folder/seen" || { tail -n 5 "$folder/errors"; exit 1; }
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
no scale_dtype: simulated 0.10, as mxfp4-pack-quantized 0.32
scales in bfloat16: simulated 0.10, as mxfp4-pack-quantized 0.32
groups of 64: simulated 0.11, compressed: NotImplementedError
SEEN
