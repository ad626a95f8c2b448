"""A disk that is full, or read-only, costs one sentence and no result; with room the run ends."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, WRITES, make_inputs, outcome
from helpers import Maker, qwen3_moe

POINTS = 10

# Short texts; and the space that is free is not asked for, so that the disk is full in the middle.
SCRIPT = f"""{SHORT}
import shutil
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 50)
from mint_mlx.cli.main import main
main()
"""


@dataclass(frozen=True)
class Ran:
    """A conversion on a small disk, and again with room.

    Attributes:
        codes: exit codes; the first alone where that had a result.
        said: what each wrote to stderr.
        listing: what was beside the output after the first.
        place: where `result` is the output's folder and `worked` the work folder at the end.
    """

    codes: list[int]
    said: list[str]
    listing: set[str]
    place: Path


def is_able_to_mount() -> bool:
    """Whether this user may have file systems of their own (Linux, without further rights)."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(not is_able_to_mount(), reason="needs unshare")


def run(source: Path, place: Path, disk: str, options: str, effort: str = "balanced") -> Ran:
    """Convert with a folder (out, cache, work or source) as a disk of its own, then with room.

    Args:
        source: a checkpoint.
        place: a new folder for all of it.
        disk: which folder is a disk.
        options: it is mounted with.
        effort: the level.
    """
    for folder in ("out", "cache", "work", "source"):
        (place / folder).mkdir(parents=True)
    (place / "script.py").write_text(SCRIPT)
    words = [sys.executable, str(place / "script.py"), "convert", str(place / "source")]
    words += ["--budget", "5bpw", "--effort", effort, "--no-smoke"]
    words += ["--work-dir", str(place / "work"), "-o", str(place / "out" / "x")]
    line = shlex.join(words)
    script = f"""
mount -t tmpfs none source && cp {source}/* source && mount -o remount,ro source || exit 99
[ {disk} = source ] || mount -t tmpfs -o {options} none {disk} || exit 99
{line} 2> first; echo $? > codes
ls -A out > listing
[ {disk} = source ] || mount -o remount,rw,size=1g {disk} || exit 99
[ -d out/x ] || {{ {line} 2> second; echo $? >> codes; }}
cp -r out result; cp -r work worked
"""
    env = os.environ | {"MINT_MLX_CACHE": str(place / "cache")}
    subprocess.run(["unshare", "-rm", "sh", "-c", script], env=env, cwd=place, check=True)
    codes = [int(code) for code in (place / "codes").read_text().split()]
    said = [path.read_text() for path in (place / "first", place / "second") if path.exists()]
    return Ran(codes, said, set((place / "listing").read_text().split()), place)


def weights(ran: Ran) -> dict[str, bytes]:
    names = ("model.safetensors", "config.json", "mint-plan.yaml")
    return {name: (ran.place / "result" / "x" / name).read_bytes() for name in names}


def check(ran: Ran, whole: Ran) -> None:
    """What every conversion on a small disk must have done."""
    if ran.codes[0]:
        errors = [line for line in ran.said[0].splitlines() if line.startswith("error: ")]
        assert ran.codes in ([1, 0], [2, 0]), ran
        assert len(errors) == 1, ran.said
        assert ran.listing <= {"x.partial"}
    assert "Traceback" not in "".join(ran.said)
    assert weights(ran) == weights(whole)
    assert {path.name for path in (ran.place / "result").iterdir()} == {"x"}
    assert not list((ran.place / "worked").iterdir())


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("disk", ["out", "cache", "work"])
def test_a_full_disk_is_one_sentence_and_with_room_the_same_bytes(
    make: Maker, tmp_path: Path, disk: str
) -> None:
    source, effort = make(qwen3_moe(2)), "best" if disk == "out" else "balanced"
    whole = run(source, tmp_path / "whole", disk, "size=1g", effort)
    assert whole.codes == [0], whole.said
    size = sum(f.stat().st_size for f in (whole.place / "result" / "x").iterdir())

    # Ten steps to what each disk must hold, roughly.
    step = {"out": size // 6, "cache": 16_384, "work": 102_400}[disk]
    full = 0
    for i in range(1, POINTS + 1):
        ran = run(source, tmp_path / str(i), disk, f"size={i * step}", effort)
        check(ran, whole)
        full += ran.said[0] != whole.said[0]
        assert disk != "cache" or ran.codes == [0]  # the result does not depend on the cache
    assert full > POINTS // 2


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("disk", ["source", "out", "cache", "work"])
def test_a_read_only_disk_is_one_sentence_or_no_obstacle(
    make: Maker, tmp_path: Path, disk: str
) -> None:
    source = make(qwen3_moe(1))
    whole = run(source, tmp_path / "whole", "source", "")
    ran = run(source, tmp_path / "ran", disk, "ro")
    check(ran, whole)
    assert (ran.codes[0] == 0) == (disk in ("source", "cache"))


@dataclass(frozen=True)
class RanCommand:
    """A command on a small disk, and again with room.

    Attributes:
        codes: exit codes; the first alone where that had a result.
        said: what each wrote to stderr.
        listing: what lay in the command's folder after the first.
        out: the command's folder at the end.
        cache: the cache at the end.
        work: the folder of temporary files at the end.
    """

    codes: list[int]
    said: list[str]
    listing: set[str]
    out: Path
    cache: Path
    work: Path


def run_command(name: str, inputs: Path, place: Path, disk: str, options: str) -> RanCommand:
    """Run a command with a folder (out, cache, work, source) as a disk of its own, then with room.

    Args:
        name: of the command.
        inputs: what it reads.
        place: a new folder for all of it.
        disk: which folder is a disk; `source` are the inputs, which are only read then.
        options: it is mounted with.
    """
    place.mkdir()
    for folder in ("out", "work", "model", "made"):
        (place / folder).mkdir()
    shutil.copytree(inputs / "cache", place / "cache")
    shutil.copyfile(inputs / "t.txt", place / "t.txt")
    (place / "script.py").write_text(SCRIPT)
    words = [sys.executable, str(place / "script.py"), name.split()[0], *WRITES[name][0]]
    line = f"(cd out && {shlex.join(words)})"
    script = f"""
for i in model made; do
  mount --bind {inputs}/$i $i || exit 99
  [ {disk} != source ] || mount -o remount,ro,bind $i || exit 99
done
[ {disk} = source ] || {{
  cp -r {disk} before && mount -t tmpfs -o size=1g none {disk} && cp -r before/. {disk} || exit 99
  mount -o remount,{options} {disk} || exit 98
}}
{line} 2> first; echo $? > codes
ls -A out > listing
[ {disk} = source ] || mount -o remount,rw,size=1g,nr_inodes=9999 {disk} || exit 99
[ $(cat codes) = 0 ] || {{ {line} 2> second; echo $? >> codes; }}
for i in out cache work; do cp -r $i $i-end; done
"""
    env = os.environ | {"MINT_MLX_CACHE": str(place / "cache"), "TMPDIR": str(place / "work")}
    subprocess.run(["unshare", "-rm", "sh", "-c", script], env=env, cwd=place, check=True)
    codes = [int(code) for code in (place / "codes").read_text().split()]
    said = [path.read_text() for path in (place / "first", place / "second") if path.exists()]
    listing = set((place / "listing").read_text().split())
    return RanCommand(
        codes, said, listing, place / "out-end", place / "cache-end", place / "work-end"
    )


def check_command(name: str, ran: RanCommand, expected: Any) -> None:
    """What every command on a small disk must have done."""
    results = {Path(file).parts[0] for file in WRITES[name][1]}
    if ran.codes[0]:
        errors = [line for line in ran.said[0].splitlines() if line.startswith("error: ")]
        assert ran.codes == [1, 0], ran
        assert len(errors) == 1, ran.said
        # (A report's folder is made before its files, each of which is written whole.)
        listing = ran.listing - ({"model-compare"} if name == "compare" else set())
        assert listing <= {f"{result}.partial" for result in results}, ran
    assert "Traceback" not in "".join(ran.said)
    assert outcome(name, ran.out, ran.cache)[0] == expected, ran
    assert {path.name for path in ran.out.iterdir()} == results
    assert not list(ran.work.glob("mint-mlx-*"))
    assert not list(ran.cache.rglob(".*.part*"))


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands read, and an empty cache beside."""
    (tmp_path / "inputs" / "cache").mkdir(parents=True)
    make_inputs(tmp_path / "inputs")
    return tmp_path / "inputs"


OTHERS = [name for name in WRITES if not name.startswith(("convert", "cache"))]


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("disk", ["out", "cache", "work"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_commands_on_a_full_disk(inputs: Path, tmp_path: Path, name: str, disk: str) -> None:
    whole = run_command(name, inputs, tmp_path / "whole", disk, "size=1g")
    assert whole.codes == [0], whole.said
    expected = outcome(name, whole.out, whole.cache)[0]

    # Up to what each disk must hold, roughly.
    folder = {"out": whole.out, "cache": whole.cache}.get(disk)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder else 400_000
    full = 0
    shares = (f"size={max(4096, int(share * size))}" for share in (0.05, 0.3, 0.6, 0.9))
    for i, options in enumerate(("nr_inodes=1", *shares)):  # no file at all, at first
        ran = run_command(name, inputs, tmp_path / str(i), disk, options)
        check_command(name, ran, expected)
        full += ran.said[0] != whole.said[0]
    # One writes nothing there, the other only what a rerun may resume from, which is skipped.
    quiet = disk == "cache" and name in ("allocate", "refine")
    assert full or disk == "work" or quiet


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("disk", ["source", "out", "cache"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_commands_on_a_read_only_disk(
    inputs: Path, tmp_path: Path, name: str, disk: str
) -> None:
    whole = run_command(name, inputs, tmp_path / "whole", "source", "")
    ran = run_command(name, inputs, tmp_path / "ran", disk, "ro")
    check_command(name, ran, outcome(name, whole.out, whole.cache)[0])
    assert disk == "out" or name == "compare" or ran.codes == [0]
