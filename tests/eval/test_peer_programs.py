"""Quantizers that need an installation of their own: what is missing, and what they export."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, llama, qwen3_moe
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.checkpoint.source import load_source
from mint_mlx.eval import peer_programs, peers
from mint_mlx.eval.build import stored_bytes
from mint_mlx.eval.peer_programs import AUTO_ROUND, GPTQ_MODEL, OPTIQ
from mint_mlx.eval.stacked import stack_entries, stack_experts
from mint_mlx.jobs.model import prepare

TEXT = "jackdaws love my big sphinx of quartz " * 60

# Stands where AutoRound would be imported: rounds to nearest, and exports each expert by itself.
AUTO_ROUND_EXPORT = """
import json, pathlib
import mlx.core as mx

class AutoScheme:
    pass

class AutoRound:
    def __init__(self, model, tokenizer, iters, dataset, nsamples, seqlen, scheme, **settings):
        texts = json.loads(pathlib.Path(dataset).read_text())
        assert iters == 200 and len(texts) == nsamples
        assert all(len(tokenizer.encode(text)) >= seqlen for text in texts)
        self.model, self.bits, self.group = model, int(scheme[1]), settings["group_size"]

    def quantize_and_save(self, out, format):
        assert format == "mlx"
        weights = {}
        block = {"bits": self.bits, "group_size": self.group, "model.embed_tokens": False}
        for name, array in mx.load(self.model + "/model.safetensors").items():
            path = name.removesuffix(".weight")
            if array.ndim == 1 or path.endswith(("embed_tokens", "mlp.gate")):
                weights[name] = array.astype(mx.float32)
                continue
            codes = mx.quantize(array, self.group, self.bits)
            names = [f"{path}.{kind}" for kind in ("weight", "scales", "biases")]
            weights |= dict(zip(names, codes))
            block[path] = {"bits": self.bits, "group_size": self.group}
        folder = pathlib.Path(out) / "name-w4g64"
        folder.mkdir(parents=True)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        (folder / "config.json").write_text(json.dumps({"quantization": block}))
"""


@pytest.fixture
def auto_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a virtual environment's, with a package in AutoRound's place."""
    packages = tmp_path / "venv" / "packages"
    (packages / "auto_round-9.9.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: auto-round\nVersion: 9.9\n"
    (packages / "auto_round-9.9.dist-info" / "METADATA").write_text(metadata)
    (packages / "auto_round.py").write_text(AUTO_ROUND_EXPORT)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(AUTO_ROUND.variable, str(tmp_path / "venv"))
    return packages


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("autoround", AUTO_ROUND),
        ("autoscheme", AUTO_ROUND),
        ("optiq", OPTIQ),
        ("gptqmodel", GPTQ_MODEL),
    ],
)
def test_a_program_that_is_not_installed_says_how_to_install_it(
    make: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    program: peer_programs.Program,
) -> None:
    monkeypatch.setenv(program.variable, str(tmp_path / "nothing"))
    job = prepare(str(make(llama(1))))
    (peer,) = peers.make_peers(name, job.source, job.inventory, 200_000, TEXT)
    assert peer.sees_text
    with pytest.raises(MintError, match=f"pip install {program.package}.*{program.variable}"):
        peer.build(tmp_path / "out")


def test_an_export_of_single_experts_becomes_a_checkpoint_of_mlx_lm(
    make: Maker, tmp_path: Path, auto_round: Path
) -> None:
    job = prepare(str(make(qwen3_moe(1, experts=12))))
    budget = int(6 * job.inventory.parameters / 8)
    (peer,) = peers.make_peers("autoround", job.source, job.inventory, budget, TEXT)
    assert peer.about.endswith("AutoRound 9.9")
    peer.build(tmp_path / "out")

    # Stock mlx-lm loads it; the tenth expert comes after the ninth.
    loaded, _ = load_model(tmp_path / "out")
    parameters = dict(tree_flatten(loaded.parameters()))
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    sizes = peers._partial_sizes(job.inventory, (2, 3, 4, 5, 6, 8), {"router"})
    config = peers.nearest(sizes, budget)
    source = mx.load(str(job.source.path / "model.safetensors"))
    expected = mx.quantize(
        source["model.layers.0.mlp.experts.10.up_proj.weight"], config.group_size, config.bits
    )
    for kind, array in zip(("weight", "scales", "biases"), expected, strict=True):
        assert mx.array_equal(parameters[f"{path}.{kind}"][10], array), kind

    # AutoRound leaves the embedding alone, which would be a third of a small model.
    codes, *_ = mx.quantize(source["model.embed_tokens.weight"], config.group_size, config.bits)
    assert mx.array_equal(parameters["model.embed_tokens.weight"], codes)
    assert parameters["model.layers.0.mlp.gate.weight"].dtype == mx.bfloat16
    assert stored_bytes(tmp_path / "out") == pytest.approx(sizes[config], rel=0.02)


def test_a_program_that_fails_is_quoted(make: Maker, tmp_path: Path, auto_round: Path) -> None:
    (auto_round / "auto_round.py").write_text("raise SystemExit('no kernel for this model')\n")
    source = load_source(str(make(llama(1))))
    with pytest.raises(MintError, match="AutoRound cannot quantize this model: no kernel"):
        peer_programs.auto_round(source, QuantConfig(4, 64), None, {}, TEXT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_of_different_bits_are_refused() -> None:
    entries = {f"model.layers.0.mlp.experts.{e}.up_proj": {"bits": 2 + e} for e in range(2)}
    with pytest.raises(MintError, match=r"experts of model\.layers\.0\.mlp\.switch_mlp\.up_proj"):
        stack_entries(entries)
    assert stack_entries({"bits": 4, "lm_head": False}) == {"bits": 4, "lm_head": False}
    experts = {f"m.mlp.experts.{e}.up_proj.scales": mx.full((2, 1), e) for e in (10, 9)}
    (stacked,) = stack_experts(experts).values()
    assert stacked[:, 0, 0].tolist() == [9, 10]


@pytest.mark.skipif(AUTO_ROUND.variable not in os.environ, reason="AutoRound isn't installed")
def test_auto_round_itself_runs(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_programs, "ITERATIONS", 2)
    source = load_source(str(make(qwen3_moe(1))))
    peer_programs.auto_round(source, QuantConfig(4, 64), None, {}, TEXT, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out")
    assert loaded(mx.array([[1, 2, 3]])).shape[1] == 3
