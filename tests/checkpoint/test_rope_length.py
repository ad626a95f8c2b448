"""The context that scaled positions were trained at is transformers' where a config leaves it out.

transformers takes the model's whole context (4.57 for YaRN; 5.24, `standardize_rope_params`), and
only families with longrope (Phi-3) state it beside the scaling. mlx-lm 0.32 takes 4,096 for YaRN
and 8,192 for Llama 3's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from mint_mlx.checkpoint.config_keys import adapt, brought

SIZE, THETA, FACTOR, CONTEXT = 64, 1e6, 4.0, 32_768
KEY = "original_max_position_embeddings"


def llama(scaling: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A Llama's config with a scaling of its positions."""
    return {
        "model_type": "llama",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "rope_theta": THETA,
        "rope_scaling": scaling,
    } | more


def yarn_periods(original: int) -> np.ndarray:
    """YaRN's periods over 2 pi (Peng et al., 2023), as transformers rounds the ramp's ends."""

    def dimension(rotations: int) -> float:
        return SIZE * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), SIZE - 1)
    period = THETA ** (np.arange(0, SIZE, 2) / SIZE)
    ramp = np.clip((np.arange(SIZE // 2) - low) / (high - low), 0, 1)
    return np.asarray(1 / (ramp / (FACTOR * period) + (1 - ramp) / period))


def periods(config: dict[str, Any]) -> np.ndarray:
    """What mlx-lm makes of the positions of a config once it is brought to its keys."""
    scaling = adapt(config)["rope_scaling"]
    return np.array(initialize_rope(SIZE, THETA, False, scaling, CONTEXT)._freqs)


@pytest.mark.parametrize("beside", [{}, {KEY: 16_384}, {KEY: None}])
def test_yarn_scales_what_transformers_scales(beside: dict[str, Any]) -> None:
    config = llama({"rope_type": "yarn", "factor": FACTOR}, **beside)
    np.testing.assert_allclose(periods(config), yarn_periods(CONTEXT), rtol=1e-5)
    assert not np.allclose(yarn_periods(CONTEXT), yarn_periods(4096), rtol=0.1)

    (change,) = brought(config)
    assert str(change) == (
        f"leaves out rope_scaling.{KEY}, which is {CONTEXT} in transformers and 4096 in mlx-lm's "
        "class llama"
    )


def test_a_context_that_is_stated_stays() -> None:
    config = llama({"rope_type": "yarn", "factor": FACTOR, KEY: 8192}, **{KEY: 16_384})
    assert adapt(config) == config
    np.testing.assert_allclose(periods(config), yarn_periods(8192), rtol=1e-5)


def test_kinds_of_transformers_5() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert adapt(llama(llama3))["rope_scaling"] == llama3 | {KEY: CONTEXT}
    longrope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert adapt(llama(longrope, **{KEY: 4096}))["rope_scaling"] == longrope | {KEY: 4096}
    linear = llama({"rope_type": "linear", "factor": 2.0})
    assert adapt(linear) == linear

    # Brought out of `rope_parameters`, or completed there for a class that reads these.
    parameters = {"rope_type": "yarn", "factor": FACTOR, "rope_theta": THETA}
    saved = llama({}) | {"rope_parameters": parameters}
    del saved["rope_scaling"], saved["rope_theta"]
    assert adapt(saved)["rope_scaling"][KEY] == CONTEXT
    assert adapt(saved | {"model_type": "qwen3"})["rope_parameters"] == parameters | {KEY: CONTEXT}
    by_layer = {"full_attention": parameters, "sliding_attention": {"rope_theta": 1e4}}
    olmo = adapt(saved | {"model_type": "olmo3", "rope_parameters": by_layer})
    assert olmo["rope_scaling"][KEY] == CONTEXT
