#!/usr/bin/env bash
# What: what a chat template is given besides messages must be plain JSON in transformers 5: a date, a Decimal or a
#   numpy array goes into the prompt as the name of its type (`<date>`), in silence; a function (such as a fixed
#   `strftime_now`, for prompts that don't change from day to day) is that text as well, and calling it fails.
# Guess before running: a function given as `strftime_now` takes the place of the built-in one in both.
# Seen (transformers 4.57.6 and 5.24.0; 2026-12-01), which this script checks: 4.57.6 writes the date, calls the
#   function; 5.24.0 writes `<date>`, and the call is a TypeError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" <<'PY'
import datetime
import decimal

import transformers
from tokenizers import Tokenizer, models

tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
tokenizer.chat_template = "Today Date: {{ date_string }} {{ messages[0].content }}"
messages = [{"role": "user", "content": "Hello"}]
print(transformers.__version__)
for value in ("1 Jan 2026", datetime.date(2026, 1, 1), decimal.Decimal("1.5")):
    print(tokenizer.apply_chat_template(messages, date_string=value, tokenize=False))
tokenizer.chat_template = "Today Date: {{ strftime_now('%d %b %Y') }}"
try:
    print(tokenizer.apply_chat_template(messages, strftime_now=lambda form: "1 Jan 2026", tokenize=False))
except TypeError as error:
    print("TypeError:", error)
PY
for version in 4.57.6 5.24.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "transformers==$version" jinja2
    "$folder/$version/bin/python" "$folder/look.py" 2> "$folder/errors" >> "$folder/seen" || { tail -n 5 "$folder/errors"; exit 1; }
done
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
4.57.6
Today Date: 1 Jan 2026 Hello
Today Date: 2026-01-01 Hello
Today Date: 1.5 Hello
Today Date: 1 Jan 2026
5.24.0
Today Date: 1 Jan 2026 Hello
Today Date: <date> Hello
Today Date: <Decimal> Hello
TypeError: 'str' object is not callable
SEEN
