"""A checkpoint's tokenizer and chat template, as mlx-lm reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.side_files import VOCABULARIES, matches

PROMPT = "The history of the city"  # for models without a chat template


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer in any of the forms that transformers reads."""
    return any(matches(path.name, VOCABULARIES) and path.is_file() for path in folder.iterdir())


def load_tokenizer(folder: Path) -> Any:
    """mlx-lm's tokenizer of a checkpoint.

    Raises:
        MintError: there is none, or transformers can't read it.
    """
    if not has_tokenizer(folder):
        raise MintError(
            f"{folder.name} has no tokenizer (tokenizer.json or tokenizer.model): copy the files "
            "of the original model into it"
        )
    from mlx_lm.utils import load_tokenizer as load

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        return load(folder, eos_token_ids=config.get("eos_token_id"))
    # transformers and tokenizers raise many types, and a bare Exception, for a damaged file.
    except Exception as error:
        raise MintError(
            f"the tokenizer of {folder.name} cannot be read ({first_line(error)}): download its "
            "files again"
        ) from error


def encode(tokenizer: Any, text: str) -> Any:
    """Token ids of a text, int64 (tokens,), with the tokenizer's special tokens at the start."""
    import numpy as np

    # verbose=False: transformers would warn that the text is longer than the context, but it is
    # cut into windows.
    return np.asarray(tokenizer.encode(text, verbose=False), dtype=np.int64)


def tokenizer_is_code(folder: Path) -> bool:
    """Whether the tokenizer is Python code that the checkpoint brings along (Kimi's is)."""
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:  # load_tokenizer refuses a malformed file
        return False
    return isinstance(settings, dict) and "AutoTokenizer" in (settings.get("auto_map") or {})


def why_no_sentence(folder: Path) -> str | None:
    """Why no sentence can be generated with this tokenizer; None where one can.

    Raises:
        MintError: the tokenizer or its template can't be used at all.
    """
    import jinja2

    if not has_tokenizer(folder):
        return (
            f"{folder.name} has no tokenizer (tokenizer.json or tokenizer.model), and mlx-lm runs "
            "no model without one: copy the original model's files into the result"
        )
    if tokenizer_is_code(folder):
        return "the tokenizer is Python code, which is copied and never run here"
    tokenizer = load_tokenizer(folder)
    try:
        if sentence_prompt(folder, tokenizer):
            return None
    except MintError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise
        return str(error)  # the template wants other messages than this one
    return f"the chat template of {folder.name} turns a message into an empty prompt"


def sentence_prompt(folder: Path, tokenizer: Any) -> list[int]:
    """A short prompt, through the chat template where there is one."""
    if tokenizer.chat_template is None:
        return [int(i) for i in tokenizer.encode(PROMPT)]
    return chat_prompt(folder, tokenizer, "Describe the sea in one sentence.")


def chat_prompt(folder: Path, tokenizer: Any, text: str) -> list[int]:
    """Token ids of a user's message through the chat template, ready for a reply.

    Raises:
        MintError: the template fails.
    """
    import jinja2

    message = [{"role": "user", "content": text}]
    try:
        return [int(i) for i in tokenizer.apply_chat_template(message, add_generation_prompt=True)]
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise MintError(
            f"the chat template of {folder.name} fails ({first_line(error)}): check its "
            "chat_template.jinja or tokenizer_config.json"
        ) from error


def first_line(error: BaseException) -> str:
    """The first lines of an exception's text as one short line, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = " ..." if len(lines) > 3 else ""
    return " ".join(lines[:3])[:300].rstrip(",") + more or type(error).__name__
