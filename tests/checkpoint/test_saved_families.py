"""Families as transformers saves them: read here, they compute what transformers computes.

fixtures/make_drawn.py made these checkpoints and their logits; docs/models.md lists them.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import OLD_MLX_LM
from released import REFUSED, RELEASED, saved

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.runtime.runner import load_runner, logits_of, trunk_output

# Larger differences than 1e-3: transformers 4 computes Apertus' activation in bfloat16.
NEAR = {"drawn_4-apertus": 5e-3}
CASES = sorted(path.parent for path in RELEASED.glob("drawn_*/*/config.json"))
pytestmark = pytest.mark.skipif(OLD_MLX_LM, reason="its classes read fewer keys")


def name_of(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"


@pytest.mark.parametrize("folder", [f for f in CASES if f.name not in REFUSED], ids=name_of)
def test_what_was_saved_computes_what_transformers_does(folder: Path, tmp_path: Path) -> None:
    source = load_source(str(saved(folder, tmp_path / folder.name)))
    reference = np.load(folder / "logits.npz")
    runner = load_runner(source.path, streamed=False)
    tokens = mx.array(reference["tokens"])[None]
    logits = np.asarray(logits_of(runner, tokens, trunk_output(runner, tokens)))[0]
    theirs = reference["logits"]
    error = np.abs(logits[-len(theirs) :] - theirs).max() / theirs.std()
    assert error < NEAR.get(name_of(folder), 1e-3)


@pytest.mark.parametrize("folder", [f for f in CASES if f.name in REFUSED], ids=name_of)
def test_what_mlx_lm_can_not_run_is_refused_by_its_reason(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MintError, match=REFUSED[folder.name]):
        open_model(load_source(str(saved(folder, tmp_path / folder.name))))
