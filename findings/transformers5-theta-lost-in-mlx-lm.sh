#!/usr/bin/env bash
# What: a config.json written by transformers 5.24.0 states the base of the rotary embedding only as
#   rope_parameters.rope_theta. Most model classes of mlx-lm 0.32.2 don't read that key: loading is
#   silent, and the model runs with its class's default base, which makes another model of it.
# Guess before running: about 40 of the families that both know would lose a theta of 123456
#   without a word.
# Seen (transformers 5.24.0, mlx-lm 0.32.2, mlx 0.32.4; 2026-11-29), which this script checks:
#   of 64 families 5 keep the stated theta, 33 lose it silently, 26 refuse the config.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import contextlib, importlib, io, json, pkgutil, warnings

import mlx_lm.models
from mlx_lm.utils import MODEL_REMAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

warnings.simplefilter("ignore")
THETA = 123456.0
known = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
keep, lose, refuse = [], [], []
for family in sorted(CONFIG_MAPPING.keys()):
    name = MODEL_REMAPPING.get(family, family)
    if name not in known:
        continue
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args_class = importlib.import_module(f"mlx_lm.models.{name}").ModelArgs
            config = CONFIG_MAPPING[family]()
            rope = config.rope_parameters
            if not rope or "rope_theta" not in rope:  # none, or one for each type of layer
                continue
            config.rope_parameters = {**rope, "rope_theta": THETA}
            written = json.loads(config.to_json_string())
    except (Exception, SystemExit):  # no class of arguments, or a package that one needs
        continue
    if "rope_theta" in written or (written.get("rope_parameters") or {}).get("rope_theta") != THETA:
        continue  # written in another way
    try:
        args = args_class.from_dict(written)
    except TypeError:
        refuse.append(family)
        continue
    rope = getattr(args, "rope_parameters", None) or {}
    read = THETA in (getattr(args, "rope_theta", None), rope.get("rope_theta"))
    (keep if read else lose).append(family)
for title, names in (("keep", keep), ("lose", lose), ("refuse", refuse)):
    print(f"{title}: {' '.join(names)}")
total = len(keep) + len(lose) + len(refuse)
print(
    f"of {total} families {len(keep)} keep the stated theta, {len(lose)} lose it silently, "
    f"{len(refuse)} refuse the config"
)
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | tee "$folder/seen"
grep -q "^of 64 families 5 keep the stated theta, 33 lose it silently, 26 refuse the config$" "$folder/seen"
