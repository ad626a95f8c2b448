"""What is shipped: one top-level package with its data inside, and rules over all source files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    p
    for top in ("mint_mlx", "converters", "eval")
    for p in sorted((ROOT / top).rglob("*.py"))
    if ".venv" not in p.parts
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree, since a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_one_package_with_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"mint_mlx"}
    wanted = (
        "py.typed",
        "recipes/default.yaml",
        "demo/demo-moe/model.safetensors",
        "demo/demo-moe/tokenizer.json",
        "demo/LICENSE.md",
        "eval/data/wiki.test.raw.gz",
        "eval/data/LICENSE.md",
        "eval/report_page.html",
    )
    assert {f"mint_mlx/{name}" for name in wanted} <= set(names)


def test_every_module_can_be_imported_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Rooms are listed by hand in pyproject.toml; an editable install hides a forgotten one."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    wanted = {
        "/".join(("mint_mlx", *(n for n in p.relative_to(ROOT).parts if n != "mint_mlx")))
        for p in SOURCES
    }
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.py"))
    assert wanted == set(names)

    # In a process of its own, whose only mint_mlx is that of the wheel.
    modules = [
        n.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for n in names
        if "__main__" not in n
    ]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib, mint_mlx\n"
        f"assert mint_mlx.__file__.startswith({str(tmp_path)!r}), mint_mlx.__file__\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_metal_lacks_is_not_used_there() -> None:
    """`mx.linalg` and float64 exist on the CPU only: each use must name that stream on its line."""
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            code = not line.strip().startswith(("#", '"'))
            if code and re.search(r"mx\.(linalg\.|float64)", line):
                assert "mx.cpu" in line, f"{path}:{number}: {line}"
