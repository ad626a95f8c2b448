"""Known differences are told in the note, in the card, by eval and by the doctor."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import OLD_MLX_LM, Cli, Notes, edit_config, write_tokenizer

from mint_mlx.checkpoint.config_keys import adapt
from mint_mlx.checkpoint.known_differences import known_differences
from mint_mlx.checkpoint.source import load_source
from mint_mlx.converters.sources.multipliers import folded
from mint_mlx.eval.evaluate import check_read_alike, evaluate
from mint_mlx.eval.settings import Settings
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.doctor import doctor

TWINS = Path(__file__).parent.parent / "fixtures" / "t5"
pytestmark = pytest.mark.skipif(OLD_MLX_LM, reason="its classes read fewer keys")


def config_of(family: str) -> dict[str, Any]:
    return dict(json.loads((TWINS / family / "config.json").read_text()))


def differences(config: dict[str, Any]) -> list[str]:
    return known_differences(adapt(config))


def parameters(family: str, **more: Any) -> dict[str, Any]:
    """A twin with other positions."""
    config = config_of(family)
    return config | {"rope_parameters": config["rope_parameters"] | more}


def test_most_models_have_none() -> None:
    families = {folder.name for folder in TWINS.iterdir()}
    assert {family for family in families if differences(config_of(family))} == {"ernie4_5_moe"}


def test_each_of_the_list_is_told() -> None:
    (text,) = differences(parameters("phi3", short_factor=[1.0, 1.0, 1.0, 1.0]))
    assert "longrope" in text and "32 tokens" in text
    (text,) = differences(parameters("gpt_oss", truncate=False))
    assert "truncate" in text and "%" in text
    assert differences(
        parameters("qwen3", truncate=False)
    )  # also of a class that reads rope_parameters
    assert "e_score_correction_bias" in differences(config_of("ernie4_5_moe"))[0]
    assert not differences(config_of("ernie4_5_moe") | {"moe_use_aux_free": False})

    jamba = {"model_type": "jamba", "num_experts": 4, "hidden_size": 32}
    assert "Jamba" in differences(jamba)[0]
    assert not differences(jamba | {"num_experts": 1})
    assert "0.001" in differences({"model_type": "nemotron_h", "time_step_min": 0.001})[0]
    assert not differences({"model_type": "nemotron_h", "time_step_min": 0.0})
    assert "one token" in differences({"model_type": "mimo_v2_flash"})[0]
    glm = config_of("glm4_moe")
    assert not differences(glm)
    assert "one expert" in differences(glm | {"num_experts_per_tok": 1, "norm_topk_prob": True})[0]
    assert not differences(glm | {"num_experts_per_tok": 1, "norm_topk_prob": False})
    afmoe = config_of("afmoe")  # its class says what the config leaves out
    assert "one expert" in differences(afmoe | {"num_experts_per_tok": 1})[0]

    # Conversions of mlx-lm leave out what ours have in the weights.
    falcon = config_of("falcon_h1")
    assert not differences(falcon)
    assert "key_multiplier" in differences(falcon | {"quantization": {"bits": 4}})[0]
    assert not differences(folded(falcon) | {"quantization": {"bits": 4}})

    minicpm = {"model_type": "minicpm3", "hidden_size": 2560, "dim_model_base": 256}
    tied = minicpm | {"tie_word_embeddings": True}
    assert "a temperature 10 times lower" in differences(tied)[0]
    assert not differences(minicpm | {"tie_word_embeddings": False})
    assert not differences(tied | {"dim_model_base": 2560})


def test_windows_that_a_class_does_not_have_are_told_where_they_count() -> None:
    assert "beyond 8 tokens" in differences(config_of("mistral") | {"sliding_window": 8})[0]
    assert not differences(config_of("mistral") | {"sliding_window": 128})  # the whole context
    assert not differences(
        config_of("llama") | {"sliding_window": 8}
    )  # transformers has none either

    qwen2 = config_of("qwen2") | {"sliding_window": 8}
    del qwen2["layer_types"]
    assert not differences(qwen2 | {"use_sliding_window": False})
    assert differences(qwen2 | {"use_sliding_window": True})
    full = ["full_attention"] * 2
    assert not differences(qwen2 | {"use_sliding_window": True, "layer_types": full})


def test_granite_converted_without_a_limit_of_its_time_steps_is_scored(tmp_path: Path) -> None:
    folder = tmp_path / "granite"
    shutil.copytree(TWINS / "granitemoehybrid", folder)
    write_tokenizer(folder)
    edit_config(folder, time_step_limit=[0.001, 100.0])
    convert(str(folder), out=tmp_path / "out", uniform="8bit-g32", smoke=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["time_step_limit"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))

    # It is read as mlx-lm runs it, which is told.
    source = load_source(str(tmp_path / "out"))
    assert "time_step_limit" not in source.config
    check_read_alike(source)
    examination = doctor(str(tmp_path / "out"))
    assert examination.findings == []
    assert any("at least 0.001" in text for text in examination.known_differences)

    # A release without the key has no limit.
    del config["quantization"]
    assert adapt(config)["time_step_limit"] == [0.0, math.inf]
    assert not any("0.001" in text for text in differences(adapt(config)))


def test_values_of_strange_types_tell_nothing() -> None:
    assert (
        differences(config_of("mistral") | {"sliding_window": 8, "max_position_embeddings": "x"})
        == []
    )
    assert differences({"model_type": "unheard-of"}) == []


def test_they_are_told_in_note_and_card_and_by_eval_and_doctor(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "ernie"
    shutil.copytree(TWINS / "ernie4_5_moe", folder)
    write_tokenizer(folder)
    notes, out = Notes(), tmp_path / "out"
    convert(str(folder), out=out, uniform="keep", smoke=False, report=notes)
    assert any("e_score_correction_bias" in text for text in notes.said)
    assert "- known difference: mlx-lm drops ERNIE's" in (out / "README.md").read_text()

    # The doctor tells it without a verdict, and eval goes on to score.
    examination = doctor(str(out))
    assert examination.findings == []
    assert "e_score_correction_bias" in examination.known_differences[0]
    printed = cli("doctor", out)
    assert printed.code == 0
    assert "known difference" in printed.out

    text = tmp_path / "text.txt"
    text.write_text("!#$%&'()*+,-./0123456789" * 40)
    notes = Notes()
    figures = evaluate(str(out), Settings(text=str(text), length=32, windows=2), report=notes)
    assert figures["perplexity"] > 1
    assert any("e_score_correction_bias" in said for said in notes.said)
