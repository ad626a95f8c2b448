"""Configs as transformers 5 writes them: stock mlx-lm's logits of the result are transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from helpers import OLD_MLX_LM, write_tokenizer

from mint_mlx.jobs.convert import convert

TWINS = Path(__file__).parent.parent / "fixtures" / "t5"
KEPT = 12  # positions at the end of which the reference has logits
FAMILIES = sorted(folder.name for folder in TWINS.iterdir())
pytestmark = pytest.mark.skipif(OLD_MLX_LM, reason="its classes read fewer keys")


def twin(family: str, folder: Path) -> Path:
    """A copy of a family's checkpoint, with a tokenizer."""
    shutil.copytree(TWINS / family, folder)
    write_tokenizer(folder)
    return folder


def converted(source: Path, target: Path) -> Path:
    convert(str(source), out=target, uniform="keep", smoke=False)
    return target


def stock_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Stock mlx-lm's logits in float32."""
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    return np.asarray(model(mx.array(tokens)[None]).astype(mx.float32))[0, -KEPT:]


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / theirs.std())


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_mlx_lm_computes_what_transformers_does(tmp_path: Path, family: str) -> None:
    source = twin(family, tmp_path / family)
    reference = np.load(source / "logits.npz")
    out = converted(source, tmp_path / "out")
    assert deviation(stock_logits(out, reference["tokens"]), reference["logits"]) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_result_as_the_same_model(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    source = twin(family, tmp_path / family)
    out = converted(source, tmp_path / "out")
    was, now = (
        AutoConfig.from_pretrained(folder).get_text_config().to_dict() for folder in (source, out)
    )
    if "rope_parameters" not in was:
        pytest.skip("this transformers writes no rope_parameters")

    # What some classes of mlx-lm ask for besides says nothing new.
    positions, others = now.pop("rope_parameters"), was.pop("rope_parameters")
    nothing_new = {"type": others.get("rope_type"), "partial_rotary_factor": 1.0, "factor": 1.0}
    assert {**nothing_new, **others} == {**nothing_new, **positions}

    # Of the rest only what is written of the file itself, and what isn't in it.
    for key in ("_name_or_path", "architectures", "dtype", "num_nextn_predict_layers"):
        was.pop(key, None)
    if family == "exaone4":  # the same in letters
        assert (was.pop("sliding_window_pattern"), now["sliding_window_pattern"]) == (2, "LG")
    assert {key: now.get(key) for key in was} == was
