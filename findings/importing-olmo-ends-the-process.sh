#!/usr/bin/env bash
# What: mlx-lm's module for OLMo 1 prints a hint and calls exit(1) when it is imported and the
#   package ai2-olmo is not there. SystemExit is no Exception: a program that tries a config in
#   `try ... except Exception`, or walks through all model modules, ends silently in the middle.
# Guess before running: one of the modules fails to import, with an ImportError.
# Seen (mlx-lm 0.32.2, mlx 0.32.4; 2026-11-29), which this script checks: of all model modules olmo
#   alone fails, with SystemExit(1); load_model of a config of that type raises it as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import importlib, json, pkgutil, tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
from mlx_lm.utils import load_model

for module in pkgutil.iter_modules(mlx_lm.models.__path__):
    try:
        importlib.import_module(f"mlx_lm.models.{module.name}")
    except BaseException as error:
        print(f"importing {module.name}: {error!r}")

folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps({"model_type": "olmo"}))
mx.save_safetensors(str(folder / "model.safetensors"), {"w": mx.zeros((1,))})
try:
    load_model(folder)
except BaseException as error:
    print(f"loading olmo: {error!r}")
PY
"$folder/venv/bin/python" "$folder/look.py" | grep -v "install ai2-olmo" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
importing olmo: SystemExit(1)
loading olmo: SystemExit(1)
SEEN
