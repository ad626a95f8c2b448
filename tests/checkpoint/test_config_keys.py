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
from families import FAMILIES as MOES
from families import NESTED, SCALED, UNCHAINED, config_of
from helpers import OLD_MLX_LM, Notes, edit_weights, write_tokenizer

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.config_keys import adapt, brought, encoded
from mint_mlx.checkpoint.unread_keys import check_keys
from mint_mlx.eval.evaluate import evaluate
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.doctor import doctor
from mint_mlx.jobs.model import prepare

TWINS = Path(__file__).parent.parent / "fixtures" / "t5"
LAST = 12  # positions at the end of which the reference has logits
FAMILIES = sorted(folder.name for folder in TWINS.iterdir())
FAMILIES_OF_MLX_LM = [*MOES, *NESTED, *UNCHAINED, *SCALED, "dbrx"]
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
    return np.asarray(model(mx.array(tokens)[None]).astype(mx.float32))[0, -LAST:]


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / theirs.std())


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_mlx_lm_and_transformers_read_the_result_as_the_same_model(
    tmp_path: Path, family: str
) -> None:
    source = twin(family, tmp_path / family)
    reference = np.load(source / "logits.npz")
    out = converted(source, tmp_path / "out")
    assert deviation(stock_logits(out, reference["tokens"]), reference["logits"]) < 1e-3
    check_configs(source, out, family)


def check_configs(source: Path, out: Path, family: str) -> None:
    """transformers reads both config.json as those of one model."""
    from transformers import AutoConfig

    was, now = (
        AutoConfig.from_pretrained(folder).get_text_config().to_dict() for folder in (source, out)
    )
    if "rope_parameters" not in was:  # this transformers writes none
        return

    # What some classes of mlx-lm ask for besides says nothing new.
    positions, others = now.pop("rope_parameters"), was.pop("rope_parameters")
    nothing_new = {"type": others.get("rope_type"), "partial_rotary_factor": 1.0, "factor": 1.0}
    assert {**nothing_new, **others} == {**nothing_new, **positions}

    # Of the rest only what is written of the file itself, and what isn't in it.
    for key in ("_name_or_path", "architectures", "dtype", "num_nextn_predict_layers"):
        was.pop(key, None)
    if family == "falcon_h1":  # they are in the weights
        for key in ("key_multiplier", "attention_in_multiplier"):
            assert (was.pop(key) != 1, now[key]) == (True, 1)
    if family == "exaone4":  # the same in letters
        assert (was.pop("sliding_window_pattern"), now["sliding_window_pattern"]) == (2, "LG")
    assert {key: now.get(key) for key in was} == was


def flat(**more: Any) -> dict[str, Any]:
    """A Llama's config as transformers 5 writes it."""
    return read_json(TWINS / "llama" / "config.json") | more


def test_configs_of_transformers_4_come_back_unchanged() -> None:
    released = list(TWINS.parent.glob("*/config.json"))
    assert len(released) > 20
    for config in [*map(read_json, released), *map(config_of, FAMILIES_OF_MLX_LM)]:
        assert adapt(config) == config
        assert brought(config) == ()


def test_the_result_of_bringing_is_left_alone() -> None:
    for family in FAMILIES:
        config = adapt(read_json(TWINS / family / "config.json"))
        assert adapt(config) == config
        assert brought(config) == ()


def test_what_transformers_reads_first_is_read_first() -> None:
    # A theta left over beside rope_parameters loses against it.
    assert adapt(flat(rope_theta=77.0))["rope_theta"] == 500.0

    # A scaling beside it wins, as in what mint-mlx writes itself.
    linear = {"rope_type": "linear", "factor": 8.0}
    assert adapt(flat(rope_scaling=linear, rope_theta=500.0))["rope_scaling"]["factor"] == 8.0

    # A class that reads both thetas is given the one that wins.
    config = read_json(TWINS / "qwen3" / "config.json")
    inner = config["rope_parameters"]["rope_theta"]
    assert adapt(config | {"rope_theta": 2 * inner})["rope_theta"] == inner

    # Of tables by type of layer, stray keys beside them count for nothing.
    config = read_json(TWINS / "gemma3_text" / "config.json")
    config["rope_parameters"]["rope_theta"] = 77.0
    assert adapt(config)["rope_theta"] == 500.0


@pytest.mark.parametrize("more", [{}, {"rope_theta": 77.0}])
def test_a_scaling_beside_that_leaves_theta_out_is_refused(more: dict[str, Any]) -> None:
    """transformers takes it in place of `rope_parameters`, theta and all."""
    linear = {"rope_type": "linear", "factor": 8.0}
    with pytest.raises(MintError, match=r"and not the rope_theta of 500\.0 in rope_parameters"):
        adapt(flat(rope_scaling=linear, **more))
    for config in (
        flat(rope_scaling=linear | {"rope_theta": 500.0}),
        flat(rope_scaling={}),
        flat(rope_scaling=None),
    ):
        assert adapt(config)["rope_theta"] == 500.0


def test_a_scaling_beside_may_leave_out_the_theta_that_its_family_has_anyway() -> None:
    config = read_json(TWINS / "llama" / "config.json") | {"model_type": "smollm3"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 2e6}
    linear = {"rope_type": "linear", "factor": 8.0}
    adapted = adapt(config | {"rope_scaling": linear})
    assert adapted["rope_theta"] == 2e6
    assert adapted["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "lfm2"])
def test_a_scaling_beside_that_the_class_does_not_do_is_refused(family: str) -> None:
    config = read_json(TWINS / family / "config.json")
    theta = config["rope_parameters"]["rope_theta"]
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": theta}
    with pytest.raises(MintError, match=r"rope_scaling\.rope_type is"):
        check_keys(adapt(config | {"rope_scaling": scaling}))


def test_a_gemma_2_without_its_cap_is_refused() -> None:
    config = read_json(TWINS / "gemma2" / "config.json") | {"attn_logit_softcapping": None}
    with pytest.raises(MintError, match=r"attn_logit_softcapping is null, .* does not run"):
        check_keys(adapt(config))


def test_a_class_that_reads_rope_parameters_gets_nothing_else() -> None:
    config = read_json(TWINS / "qwen3" / "config.json")
    assert adapt(config) == config


def test_a_model_with_a_tower_keeps_its_text_model_apart() -> None:
    text = read_json(TWINS / "gemma3_text" / "config.json")
    config = {"model_type": "gemma3", "text_config": text, "transformers_version": "5.24.0"}
    adapted = adapt(config)

    # mlx-lm's class looks for the vocabulary outside.
    assert adapted["vocab_size"] == 96
    assert adapted["text_config"]["rope_local_base_freq"] == 50.0
    assert "rope_theta" not in adapted
    assert {change.key for change in brought(config)} == {
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "sliding_window_pattern",
        "vocab_size",
    }

    # transformers 5 ties the head by the outer table, earlier ones by the inner.
    llava = {"model_type": "llava", "text_config": flat(), "tie_word_embeddings": True}
    for version, tied in (("5.0.0", True), ("4.57.6", False)):
        adapted = adapt(llava | {"transformers_version": version})
        assert adapted["text_config"]["tie_word_embeddings"] is tied


def test_the_heads_of_gemma_4_by_layers_of_any_numbering() -> None:
    config = read_json(TWINS / "gemma4_text" / "config.json")
    types = ["sliding_attention", "full_attention"] * 6
    layers = {f"{i:02d}": {"head_dim": 32} for i in range(1, 12, 2)}
    config |= {"layer_types": types, "num_hidden_layers": 12, "per_layer_config": layers}
    assert adapt(config)["global_head_dim"] == 32

    # A layer apart can't be said to mlx-lm's class.
    check_keys(adapt(config))
    layers["03"] = {"head_dim": 64}
    with pytest.raises(MintError, match=r"per_layer_config is .* gemma4_text"):
        check_keys(adapt(config))


def test_infinities_are_written_as_transformers_tags_them(tmp_path: Path) -> None:
    bare = twin("falcon_h1", tmp_path / "falcon_h1")
    tagged = read_json(bare / "config.json")
    assert tagged["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert adapt(tagged)["time_step_limit"] == [0.0, float("inf")]

    # Also where the source has them bare, as transformers 4 wrote them.
    tagged["time_step_limit"] = [0.0, float("inf")]
    (bare / "config.json").write_text(json.dumps(tagged))
    text = (converted(bare, tmp_path / "out") / "config.json").read_text()
    assert "Infinity" in text
    assert json.loads(text, parse_constant=pytest.fail)["time_step_limit"][1] == {
        "__float__": "Infinity"
    }
    assert encoded([float("-inf"), 1.0]) == [{"__float__": "-Infinity"}, 1.0]


def test_values_of_no_type_that_a_model_has_are_refused() -> None:
    for change in (
        {"rope_parameters": {"rope_theta": 5.0, "full_attention": {}}, "layer_types": 3},
        {"num_attention_heads": "two", "head_dim": None, "model_type": "qwen3_moe"},
        {"per_layer_config": {"x": 1}, "model_type": "gemma4_text"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": "1"}},
    ):
        config = flat(**change)
        try:
            check_keys(adapt(config))
        except MintError as error:
            assert "config.json" in str(error)


def test_missing_keys_and_missing_tensors_are_told_apart(tmp_path: Path) -> None:
    incomplete = "is the checkpoint complete"
    keyless = twin("qwen3_moe", tmp_path / "keyless")
    config = read_json(keyless / "config.json")
    del config["decoder_sparse_step"]
    (keyless / "config.json").write_text(json.dumps(config))
    with pytest.raises(MintError, match=r"lacks decoder_sparse_step.*qwen3_moe needs") as refusal:
        prepare(str(keyless))
    assert incomplete not in str(refusal.value)

    # More tensors than the model has is no sign of an incomplete download.
    for name, change, hint in (
        ("more", lambda w: w | {"model.more": mx.zeros(3)}, False),
        ("fewer", lambda w: {k: v for k, v in w.items() if "o_proj" not in k}, True),
        ("no expert", lambda w: {k: v for k, v in w.items() if "experts.2.up" not in k}, True),
    ):
        folder = twin("qwen3_moe", tmp_path / name)
        edit_weights(folder, change)
        with pytest.raises(MintError, match="cannot build") as refusal:
            prepare(str(folder))
        assert (incomplete in str(refusal.value)) is hint


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A checkpoint that stock mlx-lm quantized from a twin: it ignores its rope_parameters."""
    source = twin("llama", tmp_path / "llama")
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, q_group_size=32)
    return tmp_path / "theirs"


def test_the_doctor_finds_checkpoints_whose_positions_are_ignored(
    theirs: Path, tmp_path: Path
) -> None:
    texts = [str(finding) for finding in doctor(str(theirs)).findings]
    assert len(texts) == 2
    assert "rope_theta 500.0" in texts[0] and "llama" in texts[0] and "10000" in texts[0]
    assert "rope_scaling" in texts[1]

    # What mint-mlx makes of it is sound, and computes what transformers does of the source.
    out = converted(theirs, tmp_path / "out")
    assert doctor(str(out)).findings == []
    assert read_json(out / "config.json")["rope_theta"] == 500.0


def test_the_doctor_tells_a_flat_text_config(tmp_path: Path) -> None:
    out = converted(twin("qwen3_5_text", tmp_path / "qwen3_5_text"), tmp_path / "out")
    config = read_json(out / "config.json")
    flattened = config["text_config"] | {"architectures": config["architectures"]}
    (out / "config.json").write_text(json.dumps(flattened))
    assert "model_type" in str(doctor(str(out)).findings[0])


def test_eval_refuses_a_checkpoint_that_others_read_as_another_model(theirs: Path) -> None:
    with pytest.raises(MintError, match=r"rope_theta 500.0 .* gets another model"):
        evaluate(str(theirs))


def test_a_note_says_what_is_written_anew(tmp_path: Path) -> None:
    notes = Notes()
    convert(
        str(twin("llama", tmp_path / "llama")),
        out=tmp_path / "out",
        uniform="keep",
        smoke=False,
        report=notes,
    )
    assert any("rope_theta, rope_scaling" in text and "llama" in text for text in notes.said)
