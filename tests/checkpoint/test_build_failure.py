"""Why mlx-lm can't build or run a model is told by what the checkpoint is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from families import config_of, write_family
from helpers import OLD_MLX_LM, Maker, Weights, edit_config, edit_weights, llama

from mint_mlx.base.errors import METAL_ONLY, MintError
from mint_mlx.checkpoint.config_keys import adapt
from mint_mlx.checkpoint.mlxlm import check_runs
from mint_mlx.jobs.model import prepare

TWINS = Path(__file__).parent.parent / "fixtures" / "t5"


def twin(family: str, **more: Any) -> dict[str, Any]:
    return adapt(dict(json.loads((TWINS / family / "config.json").read_text())) | more)


@pytest.mark.parametrize("kind", ["SequenceClassification", "RewardModel", "QuestionAnswering"])
def test_what_judges_texts_is_told_from_what_writes_them(kind: str, make: Maker) -> None:
    folder = make(llama(1))
    edit_weights(folder, lambda w: w | {"score.weight": mx.ones((2, 128))})
    edit_config(folder, architectures=[f"LlamaFor{kind}"])
    with pytest.raises(MintError, match=rf"score.weight \(it is a LlamaFor{kind}, which writes no"):
        prepare(str(folder))


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss", "qwen3_5_moe"])
def test_a_model_without_its_head_is_told(family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", family, tie_word_embeddings=False)

    def without_head(weights: Weights) -> Weights:
        return {
            name.removeprefix("language_model.").removeprefix("model."): array
            for name, array in weights.items()
            if "lm_head" not in name
        }

    edit_weights(folder, without_head)
    edit_config(folder, architectures=["TextModel"])
    with pytest.raises(MintError, match=r"it was saved as TextModel, without a head: give one"):
        prepare(str(folder))


@pytest.mark.skipif(OLD_MLX_LM, reason="its classes read fewer keys")
@pytest.mark.parametrize(
    ("family", "kind", "lacking"),
    [
        ("olmo3", "sliding_attention", "full_attention"),
        ("gpt_oss", "full_attention", "sliding_attention"),
    ],
)
def test_a_class_that_wants_each_kind_of_layer(family: str, kind: str, lacking: str) -> None:
    depth = twin(family)["num_hidden_layers"]
    with pytest.raises(MintError, match=f"class {family} runs no model without a .* {lacking}"):
        check_runs(twin(family, layer_types=[kind] * depth))


@pytest.mark.skipif(OLD_MLX_LM, reason="its classes read fewer keys")
def test_what_fails_at_the_first_token_is_refused(tmp_path: Path) -> None:
    """mlx-lm's Llama-4 looks for the cache of its fourth layer."""
    folder = tmp_path / "model"
    shutil.copytree(TWINS / "llama4_text", folder)
    prepare(str(folder))

    edit_weights(folder, lambda w: {n: a for n, a in w.items() if "layers.3." not in n})
    stated = json.loads((folder / "config.json").read_text())
    lists = {key: stated[key][:3] for key in ("layer_types", "no_rope_layers")}
    edit_config(folder, num_hidden_layers=3, moe_layers=[1], **lists)
    with pytest.raises(MintError, match=r"mlx-lm cannot run this model \(list index out of range"):
        prepare(str(folder))


@pytest.mark.parametrize("words", METAL_ONLY)
def test_what_needs_metal_is_converted_all_the_same(
    words: str, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError(f"{words} or so")

    monkeypatch.setattr("mlx_lm.models.llama.Attention.__call__", fail)
    prepare(str(make(llama(1))))
    monkeypatch.setattr("mint_mlx.base.errors.METAL_ONLY", ())
    with pytest.raises(MintError, match="mlx-lm cannot run this model"):
        prepare(str(make(llama(1), "other")))


def test_a_class_that_looks_at_numbers_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """DBRX's would make a whole model of random weights to choose its experts."""
    monkeypatch.setattr(
        "mint_mlx.checkpoint.mlxlm.bare_model", lambda _: pytest.fail("it is built")
    )
    check_runs(config_of("dbrx"))
