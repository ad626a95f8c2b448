"""Families as transformers saves them: read here, they compute what transformers computes.

fixtures/make_drawn.py made these checkpoints and their logits; docs/models.md lists them.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from drawn import read_table, values
from helpers import OLD_MLX_LM
from mlx.utils import tree_flatten
from released import METAL, REFUSED, RELEASED, saved

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.jobs.model import prepare
from mint_mlx.runtime.runner import load_runner, logits_of, trunk_output

# Larger differences than 1e-3: transformers 4 computes Apertus' activation in bfloat16.
NEAR = {"drawn_4-apertus": 5e-3}
CASES = sorted(path.parent for path in RELEASED.glob("drawn_*/*/config.json"))
pytestmark = pytest.mark.skipif(OLD_MLX_LM, reason="its classes read fewer keys")


def name_of(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"


@pytest.mark.parametrize(
    "folder", [f for f in CASES if f.name not in (*REFUSED, *METAL)], ids=name_of
)
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


@pytest.mark.parametrize("folder", [f for f in CASES if f.name in METAL], ids=name_of)
def test_what_mlx_lm_runs_on_a_mac_alone_is_read_here(folder: Path, tmp_path: Path) -> None:
    model = open_model(load_source(str(saved(folder, tmp_path / folder.name))))
    parameters = dict(tree_flatten(model.parameters()))
    table = read_table(folder)
    experts = [name for name in table if name.endswith("experts.gate_up_proj")]
    assert experts
    for name in experts:
        fused = values(name, table[name])
        stem = name.removesuffix("gate_up_proj")
        halves = [parameters[f"{stem}{half}_proj.weight"] for half in ("gate", "up")]
        together = np.concatenate([np.array(half.astype(mx.float32)) for half in halves], axis=1)
        np.testing.assert_array_equal(together, fused)


@pytest.mark.parametrize("family", ["lfm2_vl", "muse_glimmer"])
def test_a_tower_that_stock_mlx_lm_could_not_drop_is_not_kept(family: str, tmp_path: Path) -> None:
    folder = saved(RELEASED / "drawn_5" / family, tmp_path / family)
    assert prepare(str(folder)).unused.towers
    with pytest.raises(MintError, match="with its tower: leave --parts all out"):
        prepare(str(folder), parts="all")
