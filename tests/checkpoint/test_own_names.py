"""Families of mlx-lm that transformers doesn't have, in the names that mlx-lm gives them."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path

import mlx_lm.models
import pytest
from families import FAMILIES, NESTED, UNCHAINED, config_of, write_family
from helpers import OLD_MLX_LM
from mlx_lm.utils import MODEL_REMAPPING
from other_families import OTHERS, OTHERS_NESTED
from released import RELEASED

from mint_mlx.checkpoint.config_keys import adapt
from mint_mlx.checkpoint.layers import list_layers
from mint_mlx.checkpoint.model_classes import ModelClass, model_class
from mint_mlx.checkpoint.source import load_source, open_model

READ = sorted({*OTHERS, *OTHERS_NESTED, *UNCHAINED})
NOT_BUILT = {"prism_hadamard_qwen35"}  # reads nothing but packed weights of its own
pytestmark = pytest.mark.skipif(OLD_MLX_LM, reason="it has fewer families")


@pytest.mark.parametrize("family", READ)
def test_a_family_is_read_and_its_layers_have_roles(tmp_path: Path, family: str) -> None:
    config = config_of(family)
    assert adapt(config) == config or family == "lfm2-vl"  # its text model alone is read
    source = load_source(str(write_family(tmp_path / family, family)))
    inventory = list_layers(open_model(source), source.config)
    roles = {layer.role for layer in inventory.layers}
    assert {"embedding"} < roles
    # (The projections of embeddings of several tokens.)
    assert "other" not in roles or family == "longcat_flash_ngram"


def test_every_class_of_mlx_lm_was_tried() -> None:
    tried = {*READ, *FAMILIES, *NESTED, *NOT_BUILT}
    for path in RELEASED.rglob("config.json"):
        model_type = adapt(json.loads(path.read_text()))["model_type"]
        tried.add(MODEL_REMAPPING.get(model_type, model_type))
    modules = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    classes = {
        name for name in modules if isinstance(model_class({"model_type": name}), ModelClass)
    }
    assert classes - tried == set()
