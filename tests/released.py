"""The tiny checkpoints in released layouts (fixtures/make.py), copied for a test to work on."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

from helpers import write_tokenizer
from mlx_lm.utils import MODEL_REMAPPING

RELEASED = Path(__file__).parent / "fixtures"
FAMILIES = sorted(
    folder.name for folder in RELEASED.iterdir() if (folder / "config.json").is_file()
)


def known(family: str) -> bool:
    """Whether the installed mlx-lm has the family's model."""
    kind = json.loads((RELEASED / family / "config.json").read_text())["model_type"]
    return find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}") is not None


def released(family: str, folder: Path) -> Path:
    """A copy of a family's checkpoint, with a tokenizer."""
    shutil.copytree(RELEASED / family, folder)
    write_tokenizer(folder)
    if family == "kimi_k2":  # its tokenizer is code that nobody should have to run
        settings = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
