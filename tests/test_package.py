"""What is shipped: one top-level package with its data inside, and rules that hold over all source files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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


def test_the_stream_releases_each_layer() -> None:
    assert "mx.clear_cache()" in (ROOT / "mint_mlx/stream.py").read_text()
