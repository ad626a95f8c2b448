#!/usr/bin/env bash
# What: model cards of Qwen and others tell to add a `rope_scaling` with YaRN to config.json for long
#   contexts. In a config that transformers 5 has saved, where the rotary base stands inside
#   `rope_parameters`, that table takes the place of the other as a whole: the base falls back to
#   10,000. Nothing is said.
# Expected (and what this project took it for before): the scaling joins what `rope_parameters` says.
# Seen (transformers 5.24.0; 2026-12-01), which this script checks: Qwen3 with a base of 1,000,000 and
#   YaRN by a factor of 4 gets a base of 10,000; with `rope_theta` beside the two tables, as in
#   configs of transformers 4, or with the scaling inside `rope_parameters`, it keeps its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import transformers

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def look(what, folder, **changes):
    """The base that a config has that was saved by transformers 5 and edited since."""
    saved = transformers.Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    saved.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    read = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    print(f"{what}: {read['rope_type']}, base {read['rope_theta']:.0f}")


folder = pathlib.Path(sys.argv[1])
look("as saved", folder)
look("rope_scaling added", folder, rope_scaling=YARN)
look("with rope_theta beside it", folder, rope_scaling=YARN, rope_theta=1e6)
look("inside rope_parameters", folder, rope_parameters=YARN | {"rope_theta": 1e6})
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/model" 2> "$folder/errors" > "$folder/seen" || { tail -n 5 "$folder/errors"; exit 1; }
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
as saved: default, base 1000000
rope_scaling added: yarn, base 10000
with rope_theta beside it: yarn, base 1000000
inside rope_parameters: yarn, base 1000000
SEEN
