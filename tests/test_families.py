"""What holds for every family with routed experts: roles, guards, conversion, reload, scores in memory and streamed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import OLD_MLX_LM
from families import FAMILIES, NESTED, write_family

from mint_mlx import pipeline, runner
from mint_mlx.errors import MintError
from mint_mlx.eval.protocol import Windows
from mint_mlx.eval.score import score
from mint_mlx.order import prepare
from mint_mlx.roles import EXPERTS

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


STATEFUL = {"deepseek_v41", "kimi_k3"}


def known(family: str) -> bool:
    """Whether the installed mlx-lm has the family (0.31's phimoe can't be built without rope scaling)."""
    return find_spec(f"mlx_lm.models.{family}") is not None and not (OLD_MLX_LM and family == "phimoe")


@pytest.mark.parametrize("family", [f for f in (*FAMILIES, *NESTED) if known(f)])
def test_a_family_from_its_roles_to_its_score(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / family, family)
    job = prepare(str(folder))
    roles: dict[str, list[str]] = {}
    for layer in job.inventory.layers:
        roles.setdefault(layer.role, []).append(layer.path)
    assert "expert_down" in roles and "expert_up" in roles, roles
    assert ("router" in roles) == (family not in CUSTOM_GATE), roles
    assert "other" not in roles, roles["other"]
    for layer in job.inventory.layers:
        if layer.role in EXPERTS:
            assert 0 < layer.reads < 1
        if layer.role == "router":
            assert layer.keep or layer.floor >= 8
    if family == "muse_spark":  # transformers' config for its tokenizer takes no tiny model
        return
    result = pipeline.convert(str(folder), "6bpw", tmp_path / "out", smoke=False)
    assert result.bytes <= 6 * result.inventory.parameters / 8
    windows = Windows(np.random.default_rng(0).integers(0, 96, (2, 16)).astype(np.int32))
    whole = score(runner.load_runner(tmp_path / "out", False), windows, 1)
    if family in STATEFUL:
        with pytest.raises(MintError, match="keeps state between its blocks"):
            score(runner.load_runner(tmp_path / "out", True), windows, 1)
        return
    streamed = score(runner.load_runner(tmp_path / "out", True), windows, 1)
    np.testing.assert_allclose(streamed.nll, whole.nll, rtol=1e-3, atol=1e-3)
