"""Every family with routed experts: roles, guards, conversion, scores in memory and streamed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from families import FAMILIES, NESTED, write_family
from helpers import OLD_MLX_LM
from mlx.utils import tree_flatten

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP
from mint_mlx.checkpoint.roles import EXPERTS
from mint_mlx.eval.protocol import Windows
from mint_mlx.eval.score import score
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import prepare
from mint_mlx.runtime import runner

# Routers that are no quantizable module: classes of their own, which mlx-lm leaves alone.
CUSTOM_GATE = {
    "bailing_moe_v3",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v41",
    "dots1",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "mimo_v2_flash",
    "muse_spark",
    "nemotron_h",
}
# Families that keep state between their blocks, so that they can't be streamed.
STATEFUL = {"deepseek_v41", "kimi_k3"}


def known(family: str) -> bool:
    """Whether the installed mlx-lm has the family."""
    if OLD_MLX_LM and family == "phimoe":  # can't be built there without rope scaling
        return False
    return find_spec(f"mlx_lm.models.{family}") is not None


VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("parts", ["text", "all"])
def test_a_tower_that_mlx_lm_runs_itself_stays_as_it_is(
    tmp_path: Path, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known("muse_spark"):
        pytest.skip("this mlx-lm has no such family")
    folder = write_family(tmp_path / "muse", "muse_spark", vision_config=VISION)
    monkeypatch.setattr(
        "mint_mlx.jobs.order.why_no_sentence", lambda folder: "its tokenizer takes no tiny model"
    )
    result = convert.convert(str(folder), "smallest", tmp_path / "out", parts=parts, effort="fast")

    # Planned and written as it is, with its config.
    tower = [layer.path for layer in result.inventory.layers if "vision" in layer.path]
    assert tower
    assert {result.plan.choice[path] for path in tower} == {KEEP}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_config"] == VISION
    model, _ = mlx_lm.utils.load_model(tmp_path / "out")
    weights = dict(tree_flatten(model.parameters()))
    source = mx.load(str(folder / "model.safetensors"))
    for path in tower:
        assert mx.array_equal(weights[f"{path}.weight"], source[f"{path}.weight"])


@pytest.mark.parametrize("family", [f for f in (*FAMILIES, *NESTED) if known(f)])
def test_a_family_from_its_roles_to_its_score(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / family, family)
    job = prepare(str(folder))

    # Every layer has a role, and each role its guards.
    roles: dict[str, list[str]] = {}
    for layer in job.inventory.layers:
        roles.setdefault(layer.role, []).append(layer.path)
    assert "expert_down" in roles, roles
    assert "expert_up" in roles, roles
    assert ("router" in roles) == (family not in CUSTOM_GATE), roles
    assert "other" not in roles, roles["other"]
    for layer in job.inventory.layers:
        if layer.role in EXPERTS:
            assert 0 < layer.reads < 1
        if layer.role == "router":
            assert layer.keep or layer.floor >= 8
    if family == "muse_spark":  # transformers' config for its tokenizer takes no tiny model
        return

    # It converts, and scores the same in memory and streamed.
    result = convert.convert(str(folder), "6bpw", tmp_path / "out", smoke=False, quantizer="rtn")
    assert result.bytes <= 6 * result.inventory.parameters / 8
    windows = Windows(np.random.default_rng(0).integers(0, 96, (2, 16)).astype(np.int32))
    whole = score(runner.load_runner(tmp_path / "out", False), windows, 1)
    if family in STATEFUL:
        with pytest.raises(MintError, match="keeps state between its blocks"):
            score(runner.load_runner(tmp_path / "out", True), windows, 1)
        return
    streamed = score(runner.load_runner(tmp_path / "out", True), windows, 1)
    np.testing.assert_allclose(streamed.nll, whole.nll, rtol=1e-3, atol=1e-3)
