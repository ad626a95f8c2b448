"""Profiles as files: nothing is lost, and a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import Maker, llama, qwen3_moe

from mint_mlx.base.errors import MintError
from mint_mlx.jobs import measurements, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.profile_file import load_profile, save_profile


def test_a_profile_survives_its_file(make: Maker, tmp_path: Path) -> None:
    profile = measurements.get_profile(prepare(str(make(qwen3_moe(2)))))
    save_profile(profile, tmp_path / "p.json")
    read = load_profile(tmp_path / "p.json")
    assert read.inventory == profile.inventory
    assert read.origin.fingerprint == profile.origin.fingerprint
    for path, curve in profile.curves.items():
        assert read.curves[path].configs == curve.configs
        assert np.array_equal(read.curves[path].nmse, curve.nmse)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"mint_mlx_profile": 1}', '{"mint_mlx_profile": 99}', "[" * 50_000]
)
def test_files_that_are_no_profile_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(MintError):
        load_profile(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"order": ["model.embed_tokens"', '"order": ["model.surprise"'),
        ('"dtype": "BF16"', '"dtype": "Q9"'),
        ('"shape": [96, 128]', '"shape": "x"'),
        ('"4bit-g64"', '"4bit-g63"'),
        ('"recipe": {', '"recipe": 3, "x": {'),
    ],
)
def test_a_profile_that_was_tampered_with_is_refused(
    make: Maker, tmp_path: Path, old: str, new: str
) -> None:
    path, _ = steps.write_profile(str(make(llama(1))), tmp_path / "p.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(MintError, match="damaged"):
        load_profile(path)


def test_the_file_is_plain_json(make: Maker, tmp_path: Path) -> None:
    save_profile(measurements.get_profile(prepare(str(make(llama(1))))), tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["layers"][0]["nmse"]["4bit-g64"][0] == pytest.approx(0.008, rel=0.5)
