"""What is shipped: one top-level package with its data inside, and rules that hold over all source files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Maker, llama

from mint_mlx.pipeline import convert

ROOT = Path(__file__).parent.parent
SOURCES = [
    p
    for top in ("mint_mlx", "converters", "eval")
    for p in sorted((ROOT / top).rglob("*.py"))
    if ".venv" not in p.parts
]


def test_a_wheel_holds_one_package_with_its_data(tmp_path: Path) -> None:
    copy = tmp_path / "tree"  # a build leaves files beside the sources
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"mint_mlx"}
    wanted = (
        "py.typed",
        "recipes/default.yaml",
        "demo/demo-moe/model.safetensors",
        "demo/demo-moe/tokenizer.json",
        "demo/LICENSE.md",
    )
    wanted += ("eval/data/wiki.test.raw.gz", "eval/data/LICENSE.md", "converters/writer.py", "eval/score.py", "cli.py")
    assert {f"mint_mlx/{name}" for name in wanted} <= set(names)


def test_what_metal_lacks_is_not_used_there() -> None:
    """`mx.linalg` and float64 exist on the CPU only: each use must name that stream on its line."""
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.search(r"mx\.(linalg\.|float64)", line) and not line.strip().startswith(("#", '"')):
                assert "mx.cpu" in line, f"{path}:{number}: {line}"


@pytest.mark.parametrize("sample", ["1", "0.5"])  # layers whole, and row by row
def test_what_a_layer_took_is_released(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: str
) -> None:
    released: list[int] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: released.append(1))
    result = convert(str(make(llama(2))), "5bpw", tmp_path / "out", effort="fast", sample=sample, smoke=False)
    assert len(released) >= 2 * len(result.inventory.layers)  # profiled and written
