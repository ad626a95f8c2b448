"""The command and the Python lines that run a checkpoint: what is printed last must work."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from ..base.side_files import TEMPLATES
from .tokenizer import PROMPT, tokenizer_settings
from .towers import TOWERS

_VISION = re.compile(TOWERS["vision_config"])


def has_chat_template(folder: Path) -> bool:
    """Whether a checkpoint's files bring a chat template, which `mlx_lm.chat` can't do without."""
    settings = tokenizer_settings(folder)
    return (
        any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
        or (folder / TEMPLATES).is_dir()
        or bool(settings.get("chat_template") or settings.get("chat_template_type"))
    )


def pipeline_tag(carried: Collection[str]) -> str:
    """What the Hub calls such a model.

    Args:
        carried: paths of the tensors that are carried along beside the language model.
    """
    if not carried:
        return "text-generation"
    return "image-text-to-text" if any(map(_VISION.search, carried)) else "audio-text-to-text"


def run_command(
    folder: Path, name: str, carried: Collection[str] = (), kv_bits: int | None = None
) -> str:
    """A command line that talks to a checkpoint.

    Args:
        folder: that holds its files.
        name: what it is called in the command.
        carried: paths of the tensors that are carried along beside the language model.
        kv_bits: bits of a quantized cache, which of mlx-lm's commands only `generate` has.
    """
    model = f"--model {shlex.quote(name)}"
    if carried and kv_bits is None:
        sees = pipeline_tag(carried).startswith("image")
        what = "--image picture.jpg" if sees else "--audio sound.wav"
        return f"mlx_vlm.generate {model} {what} --prompt {shlex.quote('What is this?')}"
    if kv_bits is None and has_chat_template(folder):
        return f"mlx_lm.chat {model}"
    cache = "" if kv_bits is None else f" --kv-bits {kv_bits} --quantized-kv-start 0"
    return f"mlx_lm.generate {model}{cache} --prompt {shlex.quote(PROMPT)}"


def python_text(name: str) -> str:
    """A name as a text of Python, whatever quotes it holds."""
    return json.dumps(name, ensure_ascii=False)


def python_lines(folder: Path, name: str) -> str:
    """Lines of Python that generate with mlx-lm, through the chat template where there is one.

    Args:
        folder: that holds the checkpoint's files.
        name: what `load` is given.
    """
    prompt = f'prompt = "{PROMPT}"'
    if has_chat_template(folder):
        prompt = (
            'messages = [{"role": "user", "content": "Describe the sea in one sentence."}]\n'
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
        )
    return f"""from mlx_lm import load, generate

model, tokenizer = load({python_text(name)})
{prompt}
print(generate(model, tokenizer, prompt=prompt, max_tokens=100))"""
