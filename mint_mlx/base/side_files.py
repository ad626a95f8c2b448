"""Which texts beside the weights belong to a checkpoint: known names, and a tokenizer's own code.

Converting copies these and nothing else, and a folder that holds anything else is not deleted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TEMPLATES = "additional_chat_templates"  # the one subfolder, of *.jinja files
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY.md")
VOCABULARIES = (  # any of them makes a tokenizer, for transformers
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "*.tiktoken",
)
TOKENIZER = (
    *VOCABULARIES,
    "tokenizer.jsonl",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "*vocab*.txt",
    "merges*.txt",
    "vocab.bpe",
    "bpe.codes",
    "encoder.json",
    "dict.txt",
    "emoji.json",
    "*.spm",
    "tekken.json",
    "*.model",
    "tokenizer.model.*",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR = (
    "*processor_config.json",
    "image_processor*.json",
    "feature_extractor*.json",
)
SIDE_FILES = (*LICENCES, *TOKENIZER, *PROCESSOR, "generation_config*.json")

MAX_BYTES = 1_000_000  # of a licence or of code; longer ones are none
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json")
_CONFIG_BYTES = 64_000_000
_MODULE = re.compile(r"([A-Za-z_]\w*)\.\w+")
_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.([A-Za-z_]\w*)[ \t]+import\b", re.MULTILINE)


_OUR_OWN = ("config.json", "README.md", "*.index.json", "*quant*config.json", "mint-*")
_WEIGHTS = ("*.safetensors",)
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_VOCABULARY = re.compile(r"""["'](\w[\w.-]*\.(?:txt|jsonl?|bpe|vocab|codes))["']""")


@dataclass(frozen=True)
class SideFiles:
    """What lies in a source's folder beside its weights.

    Attributes:
        copied: goes along into what is made of it, as paths in the folder.
        others: names of what does not, in order; without hidden files and what is made anew.
    """

    copied: tuple[str, ...]
    others: tuple[str, ...]


def side_files(folder: Path) -> SideFiles:
    """Find which texts of a source go along: files of known names, and the code that configs name.

    A link counts only where it leads to a file of the folder itself or to a blob of the Hub's
    cache: it could bring any file of this machine into a result that is published.
    """
    code = code_files(folder)
    copied: list[str] = []
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or matches(name, (*_OUR_OWN, *_WEIGHTS)):
            continue
        if name == TEMPLATES and path.is_dir():
            templates = sorted(path.glob("*.jinja"))
            copied += [f"{TEMPLATES}/{p.name}" for p in templates if may_be_copied(p, folder)]
        elif (name in code or matches(name, SIDE_FILES)) and may_be_copied(path, folder):
            copied.append(name)
        else:
            others.append(name)
    return SideFiles(tuple(copied), tuple(others))


def may_be_copied(path: Path, folder: Path) -> bool:
    """Whether it is a file of this folder, or of the Hub's cache, and no licence of megabytes."""
    if not path.is_file():
        return False
    if matches(path.name, LICENCES) and path.stat().st_size > MAX_BYTES:
        return False
    place = path.resolve()
    blobs = place.parent
    is_blob = blobs.name == "blobs" and blobs.parent.name.startswith("models--")
    return place.is_relative_to(folder.resolve()) or (
        is_blob and _BLOB.fullmatch(place.name) is not None
    )


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file's name matches any of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def code_files(folder: Path) -> set[str]:
    """The Python files that a checkpoint's configs name in `auto_map`, with what they import.

    Some tokenizers are such code (Kimi's is). It is copied and never run by this program, with the
    vocabularies that stand in it by name.
    """
    waiting = [name for config in _CONFIGS for name in _auto_map(folder / config)]
    names = set[str]()
    while waiting:
        name = waiting.pop()
        path = folder / name
        if name in names or not may_be_copied(path, folder):
            continue
        if path.stat().st_size <= MAX_BYTES:
            names.add(name)
            text = path.read_text(encoding="utf-8", errors="replace")
            waiting += [f"{module}.py" for module in _IMPORT.findall(text)]
            names |= {v for v in _VOCABULARY.findall(text) if may_be_copied(folder / v, folder)}
    return names


def _auto_map(path: Path) -> list[str]:
    """The files that a config's `auto_map` names; those of other repositories are not here."""
    try:
        if path.stat().st_size > _CONFIG_BYTES:
            return []
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # its own reader refuses it
        return []
    table = config.get("auto_map") if isinstance(config, dict) else None
    values = table.values() if isinstance(table, dict) else [table]
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    modules = [_MODULE.fullmatch(value) for value in flat if isinstance(value, str)]
    return [f"{module[1]}.py" for module in modules if module]
