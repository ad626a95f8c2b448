#!/bin/sh
# What: mlx-lm's server reads the tool calls that a model writes, by the schema of the tool. Arguments that the
#   schema allows, written just as the models' chat templates write them, come out as others:
#   - Qwen3-Coder (and Qwen3.5): integers go through a float, so that numbers above 2^53 (ids of posts, of
#     rows, nanoseconds) change; a string "null" becomes None, though the schema says string; of a
#     string or null, as optional parameters are declared, "5" becomes 5 and "1e3" becomes 1000.0.
#   - GLM: strings lose the spaces before and the line end after them, which is code's indentation. So in
#     MiniMax M2, where "null" becomes None as well, and numbers above 2^53 change.
#   - FunctionGemma: arrays are cut at their commas and objects at their first brace; what follows gets lost.
#   Nothing is said. (Strings of the same kind come through right in Mistral's, Kimi K2's and Gemma 4's.)
# Guess before running (and before reading the parsers): each comes back as it was sent.
# Seen (mlx-lm 0.32.2; 2026-12-01), which this script checks: 12 of 22 calls change.
# Why it matters: an agent edits another record than the model said, or writes code without its
#   indentation (vLLM and SGLang had the latter in their GLM and MiniMax parsers and mended it).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$folder/look.py" <<'PY'
import importlib.metadata
import json
import sys

from mlx_lm.tool_parsers import function_gemma, gemma4, glm47, kimi_k2, minimax_m2, mistral, qwen3_coder

print("mlx-lm", importlib.metadata.version("mlx-lm"))
KINDS = {
    "id": {"type": "integer"}, "amount": {"type": "number"}, "text": {"type": "string"},
    "maybe": {"type": ["string", "null"]}, "list": {"type": "array"}, "table": {"type": "object"},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": KINDS}}}]
CODE = "    return x\n"


def raw(value):
    """As templates write it: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def gemma(value, quote):
    """As Gemma's templates write it: strings between marks, keys without any."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, list):
        return f"[{','.join(gemma(v, quote) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{gemma(v, quote)}' for k, v in value.items())}}}"
    return json.dumps(value)


WRITTEN = {
    qwen3_coder: lambda a: "<function=f>\n" + "".join(
        f"<parameter={k}>\n{raw(v)}\n</parameter>\n" for k, v in a.items()) + "</function>",
    glm47: lambda a: "f\n" + "".join(
        f"<arg_key>{k}</arg_key>\n<arg_value>{raw(v)}</arg_value>\n" for k, v in a.items()),
    minimax_m2: lambda a: '<invoke name="f">\n' + "".join(
        f'<parameter name="{k}">{raw(v)}</parameter>\n' for k, v in a.items()) + "</invoke>",
    function_gemma: lambda a: "call:f" + gemma(a, "<escape>"),
    gemma4: lambda a: "call:f" + gemma(a, '<|"|>'),
    mistral: lambda a: f"f[ARGS]{json.dumps(a)}",
    kimi_k2: lambda a: f"functions.f:0<|tool_call_argument_begin|>{json.dumps(a)}",
}
CASES = [
    (qwen3_coder, {"id": 1234567890123456789}), (qwen3_coder, {"amount": 1234567890123456789}),
    (qwen3_coder, {"text": "null"}), (qwen3_coder, {"maybe": "5"}), (qwen3_coder, {"maybe": "1e3"}),
    (qwen3_coder, {"text": CODE}),
    (glm47, {"text": CODE}), (glm47, {"maybe": "5"}), (glm47, {"text": "null"}), (glm47, {"id": 1234567890123456789}),
    (minimax_m2, {"text": CODE}), (minimax_m2, {"text": "null"}), (minimax_m2, {"amount": 1234567890123456789}),
    (minimax_m2, {"id": 1234567890123456789}),
    (function_gemma, {"list": [1, 2], "id": 3}), (function_gemma, {"table": {"a": 1}, "id": 3}),
    (function_gemma, {"text": "null", "id": 3}),
    (gemma4, {"list": ["a", "b"], "table": {"a": 1}}), (gemma4, {"text": CODE, "maybe": "5"}),
    (mistral, {"text": CODE, "id": 1234567890123456789}), (kimi_k2, {"text": CODE, "id": 1234567890123456789}),
    (kimi_k2, {"text": "null", "maybe": "5"}),
]
changed = []
for parser, sent in CASES:
    call = parser.parse_tool_call(WRITTEN[parser](sent), TOOLS)
    came = (call[0] if isinstance(call, list) else call)["arguments"]
    name = parser.__name__.split(".")[-1]
    same = json.dumps(came) == json.dumps(sent)  # 5 and "5", 1000 and 1000.0 are others
    print(f"{name}: {sent}" + (" comes as it is" if same else f" comes as {came}"))
    if not same:
        changed.append(name)
if [changed.count(n) for n in ("qwen3_coder", "glm47", "minimax_m2", "function_gemma")] + [len(changed)] != [5, 2, 3, 2, 12]:
    sys.exit(f"changed: other arguments change now: {changed}")
PY
"$folder/venv/bin/python" "$folder/look.py"
