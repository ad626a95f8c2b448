#!/usr/bin/env bash
# What: GPTQ makes up for correlations of its calibration tokens, also for those of chance. On a layer
#   whose inputs have none, that costs more on other tokens than it saves on its own: with n tokens and
#   d columns the squared error of rounding to nearest times n/d ln(n/(n-d)), 1.39 at two tokens a
#   column, 1.15 at four. Where tokens differ in size, as those of down_proj do, few count and it is
#   worse. The usual damping, 1 % of the mean diagonal, does nothing against it.
# Guess before running (of tokens of one size): 1.8, 1.3 and 1.06 of rounding's squared error on other
#   tokens with 2, 4 and 16 tokens a column; .5, .75 and .94 on its own.
# Seen (mlx 0.32.4, mlx-lm 0.32.2; 2026-12-01), which this script checks: as in the list at its end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.quant.gptq import gptq_quantize

mx.set_default_device(mx.cpu)
mx.random.seed(0)
COLUMNS, ROWS = 1024, 128


class Model(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(COLUMNS, ROWS, bias=False)
        self.layer.weight = weight

    def __call__(self, x):
        return self.layer(x)


weight = mx.random.normal((ROWS, COLUMNS)) * 0.02
nearest = mx.dequantize(*mx.quantize(weight, 64, 4), 64, 4)


def draw(windows, spread):
    """Inputs without correlations, tokens of sizes that vary by a factor of e^spread."""
    sizes = mx.exp(mx.random.normal((windows, 64, 1)) * spread)
    return mx.random.normal((windows, 64, COLUMNS)) * sizes


for spread, name in ((0.0, "one size"), (0.7, "sizes of e^(.7 z)")):
    for share in (2, 4, 16):
        tokens, others = draw(share * 16, spread), draw(256, spread)
        model = Model(weight)
        gptq_quantize(model, tokens, 4, 64, 4, 64)
        layer = model.layer
        back = mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 4)
        ratios = []
        for x in (tokens, others):
            loss = [mx.square(x @ (w - weight).T).sum().item() for w in (back, nearest)]
            ratios.append(f"{loss[0] / loss[1]:.2f}")
        print(f"{name}, {share} a column: {ratios[0]} of rounding's error on them, {ratios[1]} on others")
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/log" | tee "$folder/seen" || { tail -n 5 "$folder/log"; exit 1; }
diff "$folder/seen" - <<'SEEN'
one size, 2 a column: 0.75 of rounding's error on them, 1.37 on others
one size, 4 a column: 0.88 of rounding's error on them, 1.15 on others
one size, 16 a column: 0.97 of rounding's error on them, 1.03 on others
sizes of e^(.7 z), 2 a column: 0.47 of rounding's error on them, 1.73 on others
sizes of e^(.7 z), 4 a column: 0.66 of rounding's error on them, 1.39 on others
sizes of e^(.7 z), 16 a column: 0.86 of rounding's error on them, 1.13 on others
SEEN
