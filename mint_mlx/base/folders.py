"""The folders that this program writes for a checkpoint, and how it knows them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import MintError
from .files import LOCK, MARK, MEASURED_FILE, MTP_FILE, PAGE_FILE, PLAN_FILE, REFINED_FILE
from .pictures import is_page, is_picture
from .remove import DESKTOP, PARTIAL, UNFINISHED, Kind
from .safetensors_header import INDEX
from .side_files import SIDE_FILES, TEMPLATES, code_files
from .yamlfile import read_yaml

JOURNAL = "journal.jsonl"  # what of a checkpoint is written
JOURNALS = (JOURNAL, f"[0-9]*-{JOURNAL}")  # the first rank's, and those of the others
SCRATCH = "scratch-"  # prefix of a quantizer's own files in the work folder
SCRATCH_FILES = tuple(
    f"{SCRATCH}{name}.safetensors" for name in ("hidden-[0-9]*", "targets", "refining", "refined")
)
SHARDS = ("model.safetensors", "model-*-of-*.safetensors", MTP_FILE)
REPORT = ("results.json", "table.md", "plot.png")  # of `compare`
_IDENTITY = {"source", "quantizer", "versions", "choice"}  # in a journal's first line
_PLAN_BYTES = 8_000_000
_TEXT_BYTES = 64_000_000


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of ours: with a plan that parses, or as refined."""
    if not (folder / "config.json").is_file():
        return False
    return _is_plan(folder / PLAN_FILE) or _has_keys(
        folder / REFINED_FILE, {"source", "kl_before", "kl_after"}
    )


def _is_plan(path: Path) -> bool:
    """Whether a file is a plan, of any version."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _PLAN_BYTES:
        return False
    try:
        data, _ = read_yaml(path, "plan")
    except MintError:
        return False
    return (
        isinstance(data, dict) and "mint_mlx_plan" in data and isinstance(data.get("layers"), list)
    )


def is_work_folder(folder: Path) -> bool:
    """Whether a folder is one in which this program works on a checkpoint.

    Its lock bears our mark. Of earlier versions the lock was empty, but beside it lies a journal, a
    checkpoint or nothing.
    """
    if not any(folder.iterdir()):  # a run that was killed at its very start leaves nothing else
        return True
    lock = folder / LOCK
    if lock.is_symlink() or not lock.is_file():
        return False
    with lock.open("rb") as file:
        if file.read(len(MARK)) == MARK.encode():
            return True
    others = {path.name for path in folder.iterdir()} - {LOCK, DESKTOP}
    return not others or _is_journal(folder / JOURNAL) or is_checkpoint(folder)


def _is_journal(path: Path) -> bool:
    """Whether a file begins with what our work is made from."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return _keys(file.readline(_TEXT_BYTES)) >= _IDENTITY


def _has_keys(path: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object with these keys."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _TEXT_BYTES:
        return False
    return keys <= _keys(path.read_text(encoding="utf-8", errors="replace"))


def _keys(text: str) -> set[str]:
    """The keys of a JSON object; none where it isn't one."""
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        return set()
    return set(data) if isinstance(data, dict) else set()


def is_report(folder: Path) -> bool:
    """Whether a folder holds results that `compare` wrote."""
    return _has_keys(folder / REPORT[0], {"source", "command", "text", "rows"})


def _named(folder: Path) -> set[str]:
    """Files of a checkpoint known by content: code, shards of any name, reports, pictures."""
    reports = set(REPORT) if is_report(folder) else set()
    pictures = {path.name for path in folder.iterdir() if is_picture(path)}
    pages = {PAGE_FILE} if is_page(folder / PAGE_FILE) else set()
    return code_files(folder) | _indexed(folder) | reports | pictures | pages


def _indexed(folder: Path) -> set[str]:
    """The shards that an index names, whatever they are called: a refined copy keeps the names."""
    path = folder / INDEX
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _TEXT_BYTES:
        return set()
    try:
        names = json.loads(path.read_text(encoding="utf-8", errors="replace"))["weight_map"]
        return {name for name in names.values() if str(name).endswith(".safetensors")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


_FILES = (
    *SIDE_FILES,
    *SHARDS,
    *(f"{name}{PARTIAL}" for name in SHARDS),
    INDEX,
    "config.json",
    "README.md",
    PLAN_FILE,
    REFINED_FILE,
    MEASURED_FILE,
    "mint-profile.json",
    "mint-sensitivity.npz",
    LOCK,
    *JOURNALS,
    f"journal{PARTIAL}",
    *SCRATCH_FILES,
    UNFINISHED,
)
_FOLDERS = {TEMPLATES: Kind("a folder of chat templates", ("*.jinja",))}
_MARKS = (LOCK, JOURNAL, PLAN_FILE, REFINED_FILE, "config.json")

# A checkpoint may still have files of its work folder, where a run was killed at its very end.
CHECKPOINT = Kind("a checkpoint", _FILES, _FOLDERS, is_checkpoint, _MARKS, _named)
WORK = Kind("a work folder", _FILES, _FOLDERS, is_work_folder, _MARKS, _named)
UNMARKED = Kind("a checkpoint", _FILES, _FOLDERS, named=_named)  # one that this process made
