"""Every family in its released layout (fixtures/make.py): convert, reload in mlx-lm, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from released import FAMILIES, known, released

from mint_mlx.checkpoint import mlxlm
from mint_mlx.checkpoint.layers import list_layers
from mint_mlx.checkpoint.source import load_source, open_model
from mint_mlx.jobs import convert
from mint_mlx.jobs.doctor import doctor

BITS = 4.5


def dense_source(folder: Path, written: Any) -> Any:
    """The source's model in float32 with the written layers' weights, dequantized by MLX."""
    source = load_source(str(folder))
    model = open_model(source)
    tensors = dict(tree_flatten(model.parameters()))

    # Each layer's stored weight gives way to the one that was written; biases stay.
    modules = dict(written.named_modules())
    for path in {layer.path for layer in list_layers(model, source.config).layers}:
        for name in ("weight", "scales", "biases"):
            tensors.pop(f"{path}.{name}", None)
        module = modules[path]
        weight = module.weight
        if hasattr(module, "bits"):
            biases = module.get("biases")
            size = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            weight = mx.dequantize(weight, module.scales, biases, **size, dtype=mx.float32)
        tensors[f"{path}.weight"] = weight

    bare = mlxlm.bare_model(source.config)
    if hasattr(bare, "sanitize"):  # Gemma 3 decides there that its embedding is the head
        tensors = bare.sanitize(tensors)
    bare.load_weights(list(tensors.items()))
    bare.eval()
    bare.set_dtype(mx.float32)
    return bare


@pytest.mark.parametrize("family", [f for f in FAMILIES if known(f)])
def test_converts_and_its_logits_are_those_of_the_dequantized_source(
    tmp_path: Path, family: str
) -> None:
    folder = released(family, tmp_path / family)
    out = tmp_path / "out"
    result = convert.convert(str(folder), f"{BITS}bpw", out, smoke=False, quantizer="rtn")
    assert doctor(str(tmp_path / "out")).findings == []
    assert 0.97 * BITS < result.bits_per_weight <= BITS

    written, _ = mlx_lm.utils.load_model(tmp_path / "out")
    written.set_dtype(mx.float32)
    source = dense_source(folder, written)
    tokens = mx.array(np.random.default_rng(0).integers(3, 96, (2, 24)))
    ours = written(tokens)
    theirs = source(tokens)
    assert mx.abs(ours - theirs).max().item() < 1e-3
    # Logits that are all alike would agree with anything.
    assert ours.max().item() - ours.min().item() > 0.1
