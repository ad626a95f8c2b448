"""The rooms of the house: what may import what, read from the syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (  # a room imports only rooms that stand before it
    "base",
    "converters.sources",
    "checkpoint",
    "rules",
    "runtime",
    "measure",
    "allocation",
    "converters.quantizers",
    "converters.output",
    "jobs",
    "eval",
    "cli",
)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name below `mint_mlx`."""
    paths = {}
    for top in ("mint_mlx", "converters", "eval"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(part for part in parts if part not in ("mint_mlx", "__init__"))
            paths[name] = path
    return paths


def room_of(module: str) -> str:
    """The room that a module lies in; '' for the package itself."""
    return next((r for r in ROOMS if module == r or module.startswith(f"{r}.")), "")


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that one imports, at its top or inside a function."""
    path = modules()[module]
    targets = set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mint_mlx"):
            target = (node.module or "")[len("mint_mlx.") :]
        else:
            continue
        for alias in node.names:
            inner = f"{target}.{alias.name}".strip(".")
            targets.add(inner if inner in modules() else target)
    return frozenset(targets - {module, ""})


def edges() -> Iterator[tuple[str, str]]:
    for module in modules():
        for target in imports(module):
            yield module, target


def test_no_import_runs_up_the_list_of_rooms() -> None:
    up = [
        f"{module} imports {target}"
        for module, target in edges()
        if room_of(module) and ROOMS.index(room_of(module)) < ROOMS.index(room_of(target))
    ]
    assert not up


def test_every_import_names_a_module() -> None:
    assert not [f"{a} imports {b}" for a, b in edges() if b not in modules()]


def test_no_imports_form_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for target in imports(module):
                visit(target, (*way, module))
            done.add(module)

    for module in modules():
        if module:
            visit(module, ())


def test_every_module_lies_in_a_room() -> None:
    flat = {path.name for path in (ROOT / "mint_mlx").glob("*.py")}
    assert flat == {"__init__.py", "__main__.py"}
    assert {m for m in modules() if not room_of(m)} == {"", "__main__", "converters"}


@pytest.mark.parametrize("folder", ["mint_mlx", "converters", "eval"])
def test_no_module_stands_beside_a_folder_of_its_name(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert not path.with_suffix("").is_dir(), path


@pytest.mark.parametrize("name", ["converters", "eval", "recipes"])
def test_the_links_into_the_package_resolve(name: str) -> None:
    link = ROOT / "mint_mlx" / name
    assert link.is_symlink() and link.resolve() == ROOT / name and link.is_dir()


def test_one_file_finds_block_numbers_and_one_the_text_config() -> None:
    """No other file has a pattern such as `\\.(\\d+)\\.`, or opens `text_config` by itself."""
    number = re.compile(r"\\\.[()?P<>\w]*(\\d|\[0-9\])\+\)?(\\\.|\(\?=)")
    assert number.search(r"\.(\d+)\.") and number.search(r"\.(?P<n>[0-9]+)(?=\.)")
    patterns, readers = set(), set()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Constant(value=str(text)) if number.search(text):
                    patterns.add(module)
                case (
                    ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant("text_config"), *_])
                    | ast.Subscript(slice=ast.Constant("text_config"))
                ):
                    readers.add(module)
    assert patterns == {"checkpoint.block_path"}
    assert readers == {"base.hf_config"}


def test_one_file_computes_divergences() -> None:
    """No other file has an expression of the form exp(p) * (p - q)."""
    computing = set()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.BinOp(
                    left=ast.Call(args=[ast.Name(id=p)]),
                    op=ast.Mult(),
                    right=ast.BinOp(left=ast.Name(id=first), op=ast.Sub()),
                ) if p == first:
                    computing.add(module)
    assert computing == {"runtime.divergence"}


# One module deletes.

DELETING = {"rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "move"}
SCRATCH = {"TemporaryDirectory", "mkdtemp"}


def test_nothing_else_deletes_or_renames() -> None:
    """`x.replace(y)` with one argument renames a file: a text's `replace` has two."""
    calls = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(attr=name) if name in DELETING | SCRATCH:
                    calls.add((path.relative_to(ROOT).as_posix(), name))
                case (
                    ast.Call(func=ast.Attribute(attr="replace"), args=[_], keywords=[])
                    | ast.Attribute(value=ast.Name(id="os"), attr="replace" | "remove")
                ):
                    calls.add((path.relative_to(ROOT).as_posix(), "replace"))
    others = {call for call in calls if call[0] != "mint_mlx/base/remove.py"}
    assert others == {("mint_mlx/base/scratch.py", "mkdtemp")}  # whose folders `discard` deletes
