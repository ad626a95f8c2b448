"""gpt-oss: MXFP4, and experts whose gate and up projections are fused."""

from __future__ import annotations

import numpy as np
import pytest
from formulas import E2M1, as_numpy, raw, weight
from mlx.utils import tree_flatten
from released import RELEASED

from mint_mlx.checkpoint.source import load_source, open_model


@pytest.mark.parametrize(
    ("projection", "fused", "rows"),
    [
        ("gate_proj", "gate_up_proj", slice(0, None, 2)),
        ("up_proj", "gate_up_proj", slice(1, None, 2)),
        ("down_proj", "down_proj", slice(None)),
    ],
)
def test_mxfp4_is_e2m1_times_a_power_of_two(projection: str, fused: str, rows: slice) -> None:
    folder = RELEASED / "gpt_oss"
    prefix = "model.layers.1.mlp.experts"
    blocks, scales = (raw(folder, f"{prefix}.{fused}_{name}") for name in ("blocks", "scales"))
    values = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1)
    sizes = 2.0 ** (scales[..., None].astype(np.float32) - 127)
    scaled = values.reshape(*blocks.shape[:3], 32) * sizes
    wanted = scaled.reshape(*blocks.shape[:2], -1)[:, rows]
    np.testing.assert_array_equal(weight(folder, f"{prefix}.{projection}"), wanted)


def test_gpt_oss_experts_in_bf16_are_those_of_the_fused_tensors() -> None:
    folder = RELEASED / "gpt_oss_bf16"
    prefix = "model.layers.0.mlp.experts"
    fused, bias = raw(folder, f"{prefix}.gate_up_proj"), raw(folder, f"{prefix}.gate_up_proj_bias")
    model = dict(tree_flatten(open_model(load_source(str(folder))).parameters()))
    for projection, start in (("gate_proj", 0), ("up_proj", 1)):
        weights, biases = (
            as_numpy(model[f"{prefix}.{projection}.{name}"]) for name in ("weight", "bias")
        )
        np.testing.assert_array_equal(weights, fused[:, :, start::2].transpose(0, 2, 1))
        np.testing.assert_array_equal(biases, bias[:, start::2])
    down = raw(folder, f"{prefix}.down_proj").transpose(0, 2, 1)
    np.testing.assert_array_equal(as_numpy(model[f"{prefix}.down_proj.weight"]), down)
