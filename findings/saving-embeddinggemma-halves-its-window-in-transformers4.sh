#!/bin/sh
# What: EmbeddingGemma's config states a window of 512 tokens (256 to each side), from which Gemma 3's config class
#   makes 257 where `use_bidirectional_attention` is set. Up to transformers 4.57 that is what it saves, too, and
#   the next loading halves it again: each fine-tune, merge or copy by `save_pretrained` has half the window of
#   the one before, in silence. transformers 5.24 no longer does so, but it reads files that 4.57 has saved
#   (and anything else does) with the halved window. (llama.cpp's converter reads config.json itself for that
#   reason, see its #15867; that saved files carry it wasn't in the tracker that could be searched.)
# Guess before running: a copy has the window, and gives the embeddings, of the original.
# Seen (transformers 4.57.6 and 5.24.0, torch 2.13.0; 2026-12-01), which this script checks with a tiny model:
#   257, 129, 65 and 33 in three copies; the mean of the hidden states of 400 tokens (of random weights) differs by
#   18, 29 and 38 %. 5.24 reads the first copy with 129, as 4.57 does.
# Why it matters: embeddings of a fine-tune don't fit those of an index that was made before it was saved, and
#   checkpoints saved until 2026 stay that way. A 257 in such a config.json tells.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet transformers==4.57.6
cat > "$folder/look.py" <<'PY'
import json
import pathlib
import sys

import torch
import transformers

folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
tokens = torch.randint(3, 99, (1, 400), generator=torch.Generator().manual_seed(0))


def embed(path):
    model = transformers.Gemma3TextModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(tokens).last_hidden_state.mean(1)


def stated(path):
    return json.loads((path / "config.json").read_text())["sliding_window"]


if what == "write":
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=512,
        use_bidirectional_attention=True,
    )
    model = transformers.Gemma3TextModel(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    model.save_pretrained(folder / "0")
    file = folder / "0/config.json"  # as the released config.json has it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 512}))
    _, first = embed(folder / "0")
    windows, distances = [], []
    for i in range(4):
        model, found = embed(folder / str(i))
        windows.append(model.config.sliding_window)
        distances.append(((found - first).norm() / first.norm()).item())
        print(f"SEEN transformers {transformers.__version__}, copy {i}: config.json has {stated(folder / str(i))}, "
              f"read as {windows[-1]}; the embedding is {distances[-1]:.1%} from the original's")
        model.save_pretrained(folder / str(i + 1))
    if windows != [257, 129, 65, 33] or distances != sorted(distances) or distances[1] < 0.005:
        sys.exit(f"changed: windows {windows}")
else:
    model, _ = embed(folder / "0")
    copy, _ = embed(folder / "1")
    copy.save_pretrained(folder / "again")
    again, _ = embed(folder / "again")
    windows = [m.config.sliding_window for m in (model, copy, again)]
    print(f"SEEN transformers {transformers.__version__}: reads the original with {windows[0]}, 4.57's copy with "
          f"{windows[1]}, and its own copy of that with {windows[2]}")
    if windows != [257, 129, 129]:
        sys.exit("changed: transformers 5 reads other windows")
PY
for what in write read; do
  "$folder/venv/bin/python" "$folder/look.py" "$folder" "$what" > "$folder/log" 2>&1 || { tail -n 5 "$folder/log"; exit 1; }
  grep "^SEEN" "$folder/log" | cut -c 6-
  [ "$what" = read ] || "$folder/venv/bin/pip" install --quiet transformers==5.24.0
done
