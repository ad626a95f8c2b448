"""What is deleted is ours: strangers of every kind stay, at every place that is ever emptied."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Cli, Notes

from mint_mlx.base.errors import MintError
from mint_mlx.base.files import MARK, MARK_FILE
from mint_mlx.base.folders import CHECKPOINT, UNMARKED, WORK
from mint_mlx.base.pictures import is_picture
from mint_mlx.base.remove import (
    Kind,
    Stranger,
    discard,
    empty_folder,
    remove_file,
    remove_folder,
)
from mint_mlx.base.scratch import open_scratch, scratch_folder, scratch_kind
from mint_mlx.base.targets import (
    check_file,
    check_picture,
    check_report_folder,
    check_target,
    put_in_place,
)
from mint_mlx.checkpoint.hub import SKELETON
from mint_mlx.converters.output.shard_writer import check_work
from mint_mlx.eval.reference_file import IS_OURS
from mint_mlx.jobs.steps import PLAN_MARKER, PROFILE_MARKER
from mint_mlx.jobs.twin import TWIN
from mint_mlx.measure import cache, pass_state, resume
from mint_mlx.measure.cache_files import BUILT, COMPARED
from mint_mlx.measure.pass_state import WALK

PLAN = "mint_mlx_plan: 1\nlayers:\n- {layer: a, as: 4bit-g64}\n"
FINGERPRINT = f"model-{'0' * 16}-{'1' * 16}"
TARGET = "elsewhere"  # a file and a folder of this name are what decoys link to


def checkpoint(folder: Path) -> Path:
    """A checkpoint of ours, as d418f6f wrote it too, with all that may lie in one."""
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates" / "tool.jinja").write_text("")
    (folder / "mint-plan.yaml").write_text(PLAN)
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["own.T", null]}}'
    )
    (folder / "own.py").write_text("from .beside import T\n")
    report = {"source": "", "command": "", "text": "", "rows": []}
    (folder / "results.json").write_text(json.dumps(report))
    names = ("config.json", "model.safetensors", "README.md", "LICENSE", "beside.py", ".DS_Store")
    for name in (*names, "tokenizer.model", "table.md", "plot.png", "mint-profile.json"):
        (folder / name).write_text("{}")
    (folder / "curve.png").write_bytes(b"...Software\0mint-mlx...")
    return folder


def work(folder: Path) -> Path:
    """A work folder of ours."""
    folder.mkdir(parents=True)
    names = ("journal.jsonl", "1-journal.jsonl", "model-00001-of-00002.safetensors.part")
    for name in (*names, "scratch-hidden-1.safetensors", f".{'a' * 32}.part.json"):
        (folder / name).write_text("")
    (folder / "lock").write_text(MARK)
    return folder


def walk(folder: Path) -> Path:
    """What an interrupted sensitivity resumes from."""
    folder.mkdir(parents=True)
    for name in ("hidden-0.safetensors", "grad-3.safetensors", "part-3.npz", "lock"):
        (folder / name).write_text("")
    return folder


def built(folder: Path) -> Path:
    """What `compare` built, and what it was building."""
    checkpoint(folder / "checkpoint")
    work(folder / "unfinished.partial")
    (folder / "made.json").write_text('{"seconds": 1.0, "reason": null}')
    (folder / "score1-0123-gpu.json").write_text("{}")
    return folder


def compared(folder: Path) -> Path:
    """All that `compare` built of a source."""
    built(folder / f"nmse-{'0' * 12}")
    (folder / f".nmse-{'0' * 12}.lock").write_text("")
    return folder


def twin(folder: Path) -> Path:
    """A twin that a killed run left, and one that it was writing."""
    checkpoint(folder / "twin")
    work(folder / "twin.partial")
    (folder / MARK_FILE).write_text(f"{MARK}{TWIN.what}\n")
    return folder


def skeleton(folder: Path) -> Path:
    """A Hub model's headers, and a shard that is being fetched."""
    noted = folder / "download" / ".cache" / "huggingface" / "download"
    noted.mkdir(parents=True)
    (noted / "x.safetensors.metadata").write_text("")
    (noted.parent / ".gitignore").write_text("*")
    for name in ("x.safetensors", "config.json", "download/x.safetensors"):
        (folder / name).write_text("")
    (folder / MARK_FILE).write_text(f"{MARK}{SKELETON.what}\nx.safetensors\nconfig.json\n")
    return folder


LEFT = f"mint-mlx-{os.getpid()}-0123abcd"  # how a temporary folder of this process is called
LEFT_TWIN = f"mint-mlx-{os.getpid()}-4567abcd"
FOLDERS: dict[str, tuple[Callable[[Path], Path], Kind, tuple[str, ...]]] = {
    "out": (checkpoint, CHECKPOINT, ("", "additional_chat_templates")),
    "out.partial": (work, WORK, ("",)),
    "scratch": (checkpoint, UNMARKED, ("",)),
    "mint-mlx-walk-k": (walk, WALK, ("",)),
    "built": (built, BUILT, ("", "checkpoint", "unfinished.partial")),
    FINGERPRINT: (compared, COMPARED, ("", f"nmse-{'0' * 12}")),
    LEFT_TWIN: (twin, scratch_kind(TWIN), ("", "twin", "twin.partial")),
    LEFT: (skeleton, scratch_kind(SKELETON), ("", "download", "download/.cache/huggingface")),
}


def label(name: str) -> str:
    """A folder's name in a test's, the same in every process that collects the tests."""
    return {LEFT: "temporary", LEFT_TWIN: "temporary twin"}.get(name, name)


def plant(folder: Path, outside: Path) -> dict[str, Callable[[], object]]:
    """Ways to put a stranger into a folder, by what it is."""
    (outside / TARGET).mkdir(exist_ok=True)
    (outside / TARGET / "precious").write_text("precious")
    return {
        "file": lambda: (folder / "thesis.txt").write_text("precious"),
        "picture": lambda: (folder / "holiday.png").write_text("precious"),
        "shard": lambda: (folder / "model_of_me.safetensors").write_text("precious"),
        "code": lambda: (folder / "experiment.py").write_text("precious"),
        "scratch": lambda: (folder / "scratch-thesis.safetensors").write_text("precious"),
        "journal": lambda: (folder / "my-journal.jsonl").write_text("precious"),
        "folder": lambda: (folder / "chapters").mkdir(),
        "link to a folder": lambda: (folder / "model.safetensors.index.json").symlink_to(
            outside / TARGET
        ),
        "link to a file": lambda: (folder / "NOTICE").symlink_to(outside / TARGET / "precious"),
        "folder of a known name": lambda: (folder / "generation_config.json").mkdir(),
    }


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", FOLDERS, ids=label)
def test_a_folder_of_ours_is_deleted_and_one_with_a_stranger_is_not(
    name: str, tmp_path: Path
) -> None:
    make, kind, places = FOLDERS[name]
    folder = make(tmp_path / "plain" / name)
    remove_folder(folder, kind)
    assert not folder.exists()

    for place in places:
        for number, decoy in enumerate(plant(tmp_path, tmp_path)):
            folder = make(tmp_path / f"{place.replace('/', '-')}{number}" / name)
            plant(folder / place, tmp_path)[decoy]()
            before = snapshot(tmp_path)
            for remove in (
                lambda folder=folder: remove_folder(folder, kind),
                lambda folder=folder: empty_folder(folder, kind, "lock"),
            ):
                with pytest.raises(Stranger, match="did not write"):
                    remove()
                assert snapshot(tmp_path) == before, (place, decoy)

            # What was checked already, or made by this very process, goes without the stranger.
            discard(folder, kind)
            assert (tmp_path / TARGET / "precious").read_text() == "precious"
            gone = before - snapshot(tmp_path)
            assert not [path for path in gone if TARGET in path or "chapters" in path]
            assert folder.is_dir(), (place, decoy)


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "scratch"], ids=label)
def test_a_folder_without_a_mark_is_nobody_s(name: str, tmp_path: Path) -> None:
    """Files of our names alone prove nothing."""
    make, kind, _ = FOLDERS[name]
    folder = make(tmp_path / name)
    for mark in ("lock", "mint-plan.yaml", "mint-refined.json", "made.json", MARK_FILE):
        for path in folder.rglob(mark):
            path.write_text("mint-mlx")
    if name == "mint-mlx-walk-k":
        (folder / "lock").unlink()
    if name == FINGERPRINT:
        kind = BUILT
        folder = next(path for path in folder.iterdir() if path.is_dir())
    for link in (folder, tmp_path / "link"):
        with pytest.raises(Stranger, match="is not"):
            remove_folder(link, kind)
        if link == folder:
            (tmp_path / "link").symlink_to(folder)


def test_a_link_to_a_folder_of_ours_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint(tmp_path / "out"))
    before = snapshot(tmp_path)
    with pytest.raises(Stranger):
        remove_folder(tmp_path / "link", CHECKPOINT)
    discard(tmp_path / "link", CHECKPOINT)
    remove_file(tmp_path / "link")
    assert snapshot(tmp_path) == before


def test_what_appears_in_a_scratch_folder_stays(tmp_path: Path) -> None:
    with scratch_folder(UNMARKED, tmp_path) as folder:
        (folder / "config.json").write_text("{}")
    assert not folder.exists()
    with scratch_folder(UNMARKED, tmp_path) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "thesis.txt").write_text("")
    assert snapshot(folder) == {"thesis.txt"}


def test_what_a_killed_process_left_goes_with_the_next_folder_of_its_kind(tmp_path: Path) -> None:
    killed, mark = open_scratch(UNMARKED, tmp_path)
    (killed / "config.json").write_text("{}")
    with scratch_folder(UNMARKED, tmp_path):  # its process lives
        assert killed.is_dir()
    mark.close()
    other = Kind("a walk", ("config.json",))
    with scratch_folder(other, tmp_path):
        assert killed.is_dir()
    (killed / "thesis.txt").write_text("precious")
    with scratch_folder(UNMARKED, tmp_path):
        assert snapshot(killed) == {MARK_FILE, "config.json", "thesis.txt"}
    (killed / "thesis.txt").unlink()
    with scratch_folder(UNMARKED, tmp_path):
        assert not killed.exists()


def test_a_temporary_folder_without_a_mark_goes_once_its_process_has_ended(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {"living": LEFT, "ended": f"mint-mlx-{ended.pid}-0123abcd", "walk": "mint-mlx-walk-k"}
    for name in names.values():
        (tmp_path / name).mkdir()
    (tmp_path / names["ended"] / MARK_FILE).write_text("")
    (tmp_path / f"{names['ended']}e").symlink_to(tmp_path / names["ended"])
    with scratch_folder(UNMARKED, tmp_path):
        pass
    assert snapshot(tmp_path) == {names["living"], names["walk"], f"{names['ended']}e"}


@pytest.mark.parametrize("names", [(), (f".{'a' * 32}.part",)])
def test_what_compare_left_before_its_mark_is_deleted(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / f"nmse-{'0' * 12}"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("")
    remove_folder(folder, BUILT)
    assert not folder.exists()
    (folder / "unfinished.partial").mkdir(parents=True)
    (folder / MARK_FILE).write_text(MARK)
    remove_folder(folder, BUILT)
    assert not folder.exists()


def test_force_names_the_stranger_and_deletes_nothing(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "out")
    check_target(target, None, force=True)
    for path in (target / "thesis.txt", target / "chapters" / "one.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        with pytest.raises(MintError, match=path.relative_to(target).parts[0]):
            check_target(target, None, force=True)
        path.unlink()
    (target / "chapters").rmdir()
    (target / "mint-plan.yaml").write_text("mint_mlx_plan: [")
    with pytest.raises(MintError, match="is not a checkpoint that mint-mlx wrote"):
        check_target(target, None, force=True)


def test_a_replaced_checkpoint_that_gets_a_stranger_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came between the look and the renaming."""
    target = checkpoint(tmp_path / "out")
    (target / "thesis.txt").write_text("precious")
    monkeypatch.setattr("mint_mlx.base.targets.check_target", lambda *_: None)
    for name in ("out.replaced-1", "out.replaced-2", "out.replaced-notes"):
        checkpoint(tmp_path / name)
    (tmp_path / "out.replaced-2" / "diary").write_text("")
    notes = Notes()
    put_in_place(work(tmp_path / "out.partial"), target, True, notes)
    assert "thesis.txt" in notes.said[0]
    (stayed,) = (p for p in tmp_path.glob("out.replaced-*") if (p / "thesis.txt").is_file())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out", stayed.name, "out.replaced-2", "out.replaced-notes"}


@pytest.mark.parametrize("lock", ["", "mine\n"])
def test_a_work_folder_needs_our_mark_and_no_links(lock: str, tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / ".DS_Store").write_text("")
    check_work(folder)
    (folder / "lock").write_text(lock)
    (folder / "thesis.txt").write_text("")
    with pytest.raises(MintError, match="holds other files"):
        check_work(folder)

    # Earlier versions left their locks empty, with a journal beside.
    identity = {"source": "", "quantizer": "rtn", "versions": {}, "choice": {}}
    (folder / "journal.jsonl").write_text(json.dumps(identity) + "\n")
    if lock == "":
        check_work(folder)
    (folder / "lock").write_text(MARK)
    check_work(folder)
    (folder / "model.safetensors.part").symlink_to(tmp_path / "precious")
    with pytest.raises(MintError, match="the link model"):
        check_work(folder)


CACHED = {
    "profiles": f"{FINGERPRINT}-01234567.json",
    "references": f"model-{'0' * 16}-text-gpu.safetensors",
    "replies": f"{FINGERPRINT}-{'0' * 12}.json",
}
CONTENT = {
    "profiles": '{"mint_mlx_profile": 3}',
    "references": '01234567{"__metadata__":{"mint_mlx_reference": ""}}',
    "replies": "[[1, 2]]",
}


def test_the_cache_gives_up_its_own_files_only(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = cache.cache_dir()
    for kind, name in CACHED.items():
        (root / kind / "chapters").mkdir(parents=True)
        (root / kind / name).write_text(CONTENT[kind])
        for decoy in ("thesis.json", f"x{name}.bak", f"{'f' * 16}{name}"):
            (root / kind / decoy).write_text("precious")
        (root / kind / f"a{name}").symlink_to(tmp_path / "precious")
    (root / "profiles" / f"{CACHED['profiles']}.begun-01234567-0").write_text("{}\n")
    (root / "profiles" / f"{CACHED['profiles']}.begun-notes").write_text("precious")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / f"{FINGERPRINT}-128.npz").write_text("precious")
    (root / "sensitivities").symlink_to(tmp_path / "linked")
    compared(root / "compare" / FINGERPRINT)
    compared(root / "compare" / f"a{FINGERPRINT}")
    (root / "compare" / FINGERPRINT / f"nmse-{'0' * 12}" / "thesis.txt").write_text("precious")
    (root / "compare" / "my results").mkdir()
    walk(tmp_path / "mint-mlx-walk-k")
    (walk(tmp_path / "mint-mlx-walk-l") / "thesis.txt").write_text("precious")

    # A stranger inside one entry leaves that entry as it is, and is named; all others go.
    before = snapshot(tmp_path)
    done = cli("cache", "clear")
    assert done.code == 1
    assert "thesis.txt" in done.err
    gone = {path for path in before - snapshot(tmp_path) if f"/a{FINGERPRINT}" not in path}
    ours = {f"cache/{kind}/{name}" for kind, name in CACHED.items()}
    ours |= {f"cache/profiles/{CACHED['profiles']}.begun-01234567-0", "mint-mlx-walk-k"}
    assert {path for path in gone if not path.startswith("mint-mlx-walk-k/")} == ours
    assert (tmp_path / "mint-mlx-walk-l" / "thesis.txt").exists()

    # Once it is moved away the rest goes, and strangers beside are named in a note.
    (root / "compare" / FINGERPRINT / f"nmse-{'0' * 12}" / "thesis.txt").unlink()
    done = cli("cache", "clear")
    assert done.code == 0
    assert "did not write these" in done.err
    assert {path.name for path in (root / "compare").iterdir()} == {"my results"}


def test_a_walk_s_folder_that_is_someone_else_s_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (walk(tmp_path / "mint-mlx-walk-k") / "thesis.txt").write_text("")
    before = snapshot(tmp_path)
    with pass_state.pass_folder("k") as folder:
        assert folder != tmp_path / "mint-mlx-walk-k"
    assert snapshot(tmp_path) == before


def test_only_notes_of_the_same_file_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "a.json.begun-01234567-0").write_text("")
    others = {"a.json.begun-notes", "ba.json.begun-01234567-0", "a.json"}
    for name in others:
        (tmp_path / name).write_text("")
    (tmp_path / "a.json.begun-01234567-1").symlink_to(tmp_path / "a.json")
    resume.clear(tmp_path / "a.json")
    assert snapshot(tmp_path) == others | {"a.json.begun-01234567-1"}


def test_a_file_of_another_kind_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for marker, ours in (
        (PROFILE_MARKER, b'{"mint_mlx_profile": 3, "source": ""}'),
        (PLAN_MARKER, b"# A plan\nmint_mlx_plan: 1\n"),
        (IS_OURS, bytes(8) + b'{"__metadata__":{"mint_mlx_reference":"{}"}}'),
    ):
        path.write_bytes(ours)
        check_file(path, marker, force=True)
        words = b"how mint_mlx_profile, mint_mlx_plan: and mint_mlx_reference are used"
        path.write_bytes(words)
        with pytest.raises(MintError, match="something else"):
            check_file(path, marker, force=True)


def test_a_picture_and_a_report_of_others_are_not_written_over(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from mint_mlx.base.pictures import write_picture

    for name in ("a.png", "a.pdf", "a.svg"):
        (tmp_path / name).write_bytes(b"precious, with mint-mlx in it")
        with pytest.raises(MintError, match="not a picture that mint-mlx drew"):
            check_picture(tmp_path / name)
        write_picture(Figure((1, 1)), tmp_path / name)
        check_picture(tmp_path / name)
        assert is_picture(tmp_path / name)

    check_report_folder(checkpoint(tmp_path / "out"))
    (tmp_path / "out" / "results.json").write_text('{"rows": []}')
    with pytest.raises(MintError, match=r"holds a results\.json"):
        check_report_folder(tmp_path / "out")
