"""A checkpoint's tokenizer and chat template, as mlx-lm reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.report import Report
from ..base.side_files import VOCABULARIES, matches
from .chat_template import TemplateProblem, chat_prompts

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
        # It reads config.json for the tokenizer's class, and checks every value there.
        if "Validation error for field" in str(error):
            raise MintError(
                f"config.json of {folder.name} holds a value that transformers refuses "
                f"({first_line(error)}): correct it, or download it again"
            ) from error
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
    table = tokenizer_settings(folder).get("auto_map")
    if isinstance(table, list):  # transformers' older form, of tokenizers alone
        return any(isinstance(name, str) for name in table)
    return isinstance(table, dict) and "AutoTokenizer" in table


def has_runnable_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that is no code of a stranger, which is never run."""
    return has_tokenizer(folder) and not tokenizer_is_code(folder)


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing where it is malformed: load_tokenizer refuses it."""
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def why_no_sentence(folder: Path) -> str | None:
    """Why no sentence can be generated with this tokenizer; None where one can.

    A chat template is not looked at: that waits until a sentence is written.

    Raises:
        MintError: the tokenizer can't be read.
    """
    if not has_tokenizer(folder):
        return (
            f"{folder.name} has no tokenizer (tokenizer.json or tokenizer.model), and mlx-lm runs "
            "no model without one: copy the original model's files into the result"
        )
    if tokenizer_is_code(folder):
        return "the tokenizer is Python code, which is copied and never run here"
    load_tokenizer(folder)
    return None


def sentence_prompt(folder: Path, tokenizer: Any, report: Report) -> tuple[list[int], str]:
    """A short prompt, through the chat template where there is one that works.

    Args:
        folder: of the checkpoint.
        tokenizer: its own.
        report: is told of a template that doesn't.

    Returns:
        Token ids, and the words that the sentence begins with: none for a reply.
    """
    if tokenizer.chat_template is not None:
        try:
            return chat_prompts(folder, ["Describe the sea in one sentence."])[0], ""
        except TemplateProblem as problem:
            report.note(f"{problem}; the sentence goes on from a plain prompt instead")
    return [int(i) for i in tokenizer.encode(PROMPT)], PROMPT


def first_line(error: BaseException) -> str:
    """The first lines of an exception's text as one short line, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = " ..." if len(lines) > 3 else ""
    return " ".join(lines[:3])[:300].rstrip(",") + more or type(error).__name__
