#!/bin/sh
# Make a virtual environment and install mint-mlx into it: sh bootstrap.sh .venv [dev]
# Uses uv where it is installed, else a python3 of 3.10 or later; an older python3 (macOS has 3.9) installs uv,
# which finds or fetches a newer one.
set -eu

venv=$1
target=.${2:+[$2]}

say() { echo "mint-mlx: $*" >&2; }

with_uv() {
    "$@" venv --quiet --allow-existing --python '>=3.10' "$venv" &&
        "$@" pip install --quiet --python "$venv/bin/python" --editable "$target"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

say "downloads about 90 MB of packages (mlx, mlx-lm, transformers, matplotlib and what they need), once: a minute or two"
if command -v uv >/dev/null 2>&1; then
    say "installing with uv into $venv"
    with_uv uv
    exit
fi

for python in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
    if new_enough "$python" && "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        say "installing with $python into $venv"
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target"
        exit
    fi
done

helper=$venv.uv
if command -v python3 >/dev/null 2>&1 && python3 -m venv "$helper" 2>/dev/null &&
    "$helper/bin/python" -m pip install --quiet --disable-pip-version-check uv && with_uv "$helper/bin/uv"; then
    rm -rf "$helper"
    exit
fi
rm -rf "$helper"
say "needs Python 3.10 or later with venv: install it (python.org, 'brew install python', 'apt install python3-venv'), or uv (docs.astral.sh/uv), then run the same command again"
exit 1
