"""Results of families with a tower load in mlx-vlm, as LM Studio's engine loads them, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from families import write_family
from helpers import Notes, write_tokenizer
from released import RELEASED, known, saved
from seeing import SEEING, seeing

from mint_mlx.base.safetensors_header import read_folder
from mint_mlx.checkpoint.config_keys import adapt
from mint_mlx.checkpoint.vlm_keys import (
    NEEDS_VISION,
    TEXT_ALONE,
    reads_null,
    vlm_limits,
    with_vlm_keys,
)
from mint_mlx.jobs import convert
from mint_mlx.jobs.doctor import doctor

TOKENS = mx.array(np.random.default_rng(0).integers(9, 90, (1, 24)))
# Families of which mlx-vlm computes the same products in another order.
ROUNDING = {"qwen3_5": 1e-4, "qwen3_5_moe": 1e-4} | dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), 1e-5
)


def written(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def converted(family: str, folder: Path, parts: str, notes: Notes | None = None) -> Path:
    if not known("llama4" if family == "llama4" else f"drawn_5/{family}"):
        pytest.skip("this mlx-lm has no such family")
    source = seeing(family, folder / "source")
    chosen: dict[str, Any] = {"uniform": "8bit-g32", "parts": parts, "smoke": False}
    if family == "gemma3" and parts == "text":
        chosen["overrides"] = ["embed_tokens=keep"]
    convert.convert(str(source), out=folder / parts, report=notes, **chosen)
    return folder / parts


def test_a_text_model_keeps_what_its_class_in_mlx_vlm_cannot_do_without(tmp_path: Path) -> None:
    notes = Notes()
    folder = converted("gemma3", tmp_path, "text", notes)
    source = written(tmp_path / "source")
    config = written(folder)
    assert config["vision_config"] == source["vision_config"]
    assert config["text_config"]["rope_global_base_freq"] == 1e6
    assert not [name for name in config if name.startswith(("image", "boi", "mm_"))]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["processor_class"] == "AutoTokenizer"
    assert doctor(str(folder)).findings == []
    assert any("Gemma 3 with a quantized embedding" in note for note in notes.said)

    # The doctor finds in others' repositories what is amiss.
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": None}))
    del settings["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    problems = [finding.problem for finding in doctor(str(folder)).findings]
    assert any(problem.startswith("has no vision_config, without which") for problem in problems)
    assert any("look for a processor of images" in problem for problem in problems)


def test_a_tower_gets_names_that_mlx_lm_drops_and_mlx_vlm_reads(tmp_path: Path) -> None:
    folder = converted("qwen3_vl", tmp_path, "all")
    names = {name for table in read_folder(folder).values() for name in table}
    assert not [name for name in names if "visual" in name]
    assert "vision_tower.patch_embed.proj.weight" in names
    loaded, _ = mlx_lm.utils.load_model(folder)
    assert mx.isfinite(loaded(TOKENS)).all()
    assert doctor(str(folder)).findings == []


def test_null_for_a_tower_is_told(tmp_path: Path) -> None:
    folder = converted("qwen3_5", tmp_path, "text")
    config = written(folder)
    assert "vision_config" not in config
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": None}))
    (finding,) = doctor(str(folder)).findings
    assert finding.problem.startswith("says null for vision_config")


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_what_transformers_5_wrote_is_said_in_both_words(family: str) -> None:
    config = adapt(written(RELEASED / "drawn_5" / family))
    said = with_vlm_keys(config)
    text = said.get("text_config", said)
    rope = config["text_config"]["rope_parameters"]
    if family == "gemma3":
        assert text["rope_global_base_freq"] == rope["full_attention"]["rope_theta"]
        return
    assert text["rope_theta"] == rope["rope_theta"]
    assert text["rope_scaling"]["mrope_section"] == rope["mrope_section"]
    assert text["rope_scaling"]["type"] == "default"
    assert said["vision_config"]["model_type"] == family
    assert ("text_config" in said) == (family != "qwen2_vl")
    assert adapt(said) == said


def test_what_a_flat_release_said_gives_way_to_the_table() -> None:
    """transformers 4 writes the old flat keys beside the table that it goes by."""
    text = {"model_type": "qwen2_5_vl_text", "rope_theta": 50.0, "vocab_size": 104}
    outer = {"rope_theta": 5000.0, "vocab_size": 96, "architectures": ["A"], "dtype": "bfloat16"}
    config = outer | {"model_type": "qwen2_5_vl", "text_config": text | {"architectures": ["B"]}}
    said = with_vlm_keys(config)
    assert (said["rope_theta"], said["vocab_size"]) == (50.0, 104)
    assert (said["architectures"], said["model_type"]) == (["A"], "qwen2_5_vl")


def test_limits_are_told() -> None:
    """What mlx-vlm can't load whatever config.json says."""
    (limit,) = vlm_limits({"model_type": "gemma3"}, has_tower=False, quantized=True)
    assert "--override embed_tokens=keep" in limit
    assert not list(vlm_limits({"model_type": "gemma3"}, has_tower=True, quantized=False))
    assert list(vlm_limits({"model_type": "gemma3n"}, has_tower=False, quantized=False))
    assert not TEXT_ALONE.keys() & NEEDS_VISION


def test_gemma_4_may_have_no_ears() -> None:
    """mlx-vlm 0.7.10 loads a Gemma 4 whose audio_config is null, as transformers writes it."""
    assert reads_null({"model_type": "gemma4"}) == {"audio_config"}
    assert not reads_null({"model_type": "gemma3"})


def test_a_head_of_its_own_is_no_limit_of_gemma_3(tmp_path: Path) -> None:
    """mlx-vlm writes one beside the quantized embedding, and loads both."""
    folder = converted("gemma3", tmp_path, "text")
    shard = next(folder.glob("model*.safetensors"))
    weights = mx.load(str(shard))
    table = "language_model.model.embed_tokens"
    for kind, array in zip(
        ("weight", "scales", "biases"), mx.quantize(weights[f"{table}.weight"], 32, 8), strict=True
    ):
        weights[f"{table}.{kind}"] = weights[f"language_model.lm_head.{kind}"] = array
    config = written(folder)
    config["quantization"] |= {table: {"bits": 8, "group_size": 32, "mode": "affine"}}
    (folder / "config.json").write_text(json.dumps(config))
    for with_head in (True, False):
        if not with_head:
            weights = {name: array for name, array in weights.items() if "lm_head" not in name}
        mx.save_safetensors(str(shard), weights, metadata={"format": "mlx"})
        told = [
            text for text in doctor(str(folder)).known_differences if "quantized embedding" in text
        ]
        assert bool(told) != with_head


@pytest.mark.parametrize("family", ["llava", "mistral3"])
def test_linear_positions_are_said_in_both_words(family: str) -> None:
    """Of other kinds mlx-vlm's class computes others, where it loads them at all."""
    for kind, first in (("linear", "type"), ("yarn", "rope_type")):
        rope = {"rope_type": kind, "factor": 4.0}
        config = {"model_type": family, "text_config": {"rope_scaling": rope}}
        said = with_vlm_keys(config)
        assert next(iter(said["text_config"]["rope_scaling"])) == first
        limits = list(vlm_limits(said, has_tower=False, quantized=True))
        assert bool(limits) == (kind == "yarn")
    plain = {"model_type": family, "text_config": {"rope_parameters": {"rope_type": "default"}}}
    assert with_vlm_keys(plain) == plain
    assert not list(vlm_limits(plain, has_tower=False, quantized=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "mistral3"])
def test_mlx_vlm_computes_the_same_at_linear_positions(tmp_path: Path, family: str) -> None:
    vlm = pytest.importorskip(
        "mlx_vlm.utils", reason="mlx-vlm is not a dependency: install it to run this"
    )
    source = seeing(family, tmp_path / "source")
    config = written(source)
    config["text_config"].pop("rope_parameters", None)
    config["text_config"] |= {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (source / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "out"
    convert.convert(str(source), uniform="8bit-g32", out=folder, smoke=False)

    model, text = vlm.load_model(folder, lazy=True), mlx_lm.utils.load_model(folder)[0]
    model.set_dtype(mx.float32)
    text.set_dtype(mx.float32)
    difference = mx.abs(model.language_model(TOKENS).logits - text(TOKENS))
    assert difference.max().item() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["kimi_k25", "kimi_k3", "muse_glimmer", "pixtral", "kimi_vl", "lfm2_vl"]
)
def test_mlx_vlm_loads_the_text_alone_or_is_known_not_to(tmp_path: Path, family: str) -> None:
    """Families of which there is no whole tiny checkpoint with a tower."""
    vlm = pytest.importorskip(
        "mlx_vlm.utils", reason="mlx-vlm is not a dependency: install it to run this"
    )
    if family in ("muse_glimmer", "lfm2_vl"):
        source = saved(RELEASED / "drawn_5" / family, tmp_path / "source")
        write_tokenizer(source)
    else:
        source = write_family(tmp_path / "source", family)
    folder = tmp_path / "out"
    convert.convert(str(source), uniform="8bit-g32", out=folder, smoke=False)
    if family in TEXT_ALONE:
        with pytest.raises(ValueError, match="parameters not in model"):
            vlm.load_model(folder, lazy=True)
        return
    model, text = vlm.load_model(folder, lazy=True), mlx_lm.utils.load_model(folder)[0]
    model.set_dtype(mx.float32)
    text.set_dtype(mx.float32)
    difference = mx.abs(model.language_model(TOKENS).logits - text(TOKENS))
    assert difference.max().item() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["text", "all"])
@pytest.mark.parametrize("family", SEEING)
def test_mlx_vlm_computes_the_same(tmp_path: Path, family: str, parts: str) -> None:
    """As LM Studio's engine does: the model lazily, its caches, and a processor."""
    vlm = pytest.importorskip(
        "mlx_vlm.utils", reason="mlx-vlm is not a dependency: install it to run this"
    )
    from mlx_vlm.models.cache import make_prompt_cache

    folder = converted(family, tmp_path, parts)
    model = vlm.load_model(folder, lazy=True)
    text, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    text.set_dtype(mx.float32)
    logits = model.language_model(TOKENS, cache=make_prompt_cache(model.language_model)).logits
    cache = text.make_cache() if hasattr(text, "make_cache") else None
    difference = mx.abs(logits - text(TOKENS, cache=cache))
    assert difference.max().item() <= ROUNDING.get(family, 0)
    if parts == "text":
        vlm.load_image_processor(folder)
        assert vlm.load_processor(folder, True, eos_token_ids=[0]) is not None
