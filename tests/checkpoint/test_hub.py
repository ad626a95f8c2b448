"""The Hugging Face Hub, played by a small local server: headers first, download later, a sentence
for each fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Cli, Maker, qwen3_moe

from mint_mlx.allocation.artifacts import ARTIFACTS
from mint_mlx.base.errors import MintError, explain
from mint_mlx.checkpoint.hub import check_upload, upload
from mint_mlx.jobs import convert

COMMIT = "c" * 40


@dataclass
class FakeHub:
    """What the server holds and what was asked of it."""

    folder: Path
    fault: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    bytes_sent: dict[str, int] = field(default_factory=dict)
    url: str = ""
    home: Path = Path()

    def fill_cache(self) -> Path:
        """The cache as a whole download leaves it: the snapshot."""
        kept = self.home / "hub" / "models--org--tiny"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text(COMMIT)
        shutil.copytree(self.folder, kept / "snapshots" / COMMIT)
        return kept / "snapshots" / COMMIT

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against this hub in a process of its own."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [
            sys.executable,
            "-m",
            "mint_mlx",
            *args,
            *(["--effort", "fast"] if args[0] == "convert" and "--plan" not in args else []),
        ]
        return subprocess.run(
            command,
            env={**os.environ, **own, **env},
            capture_output=True,
            text=True,
            cwd=self.home,
            timeout=120,
            check=False,
        )


@pytest.fixture
def hub(make: Maker, tmp_path: Path) -> Iterator[FakeHub]:
    state = FakeHub(make(qwen3_moe(2), shards=2), home=tmp_path / "home")
    state.home.mkdir()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if state.fault:
                code = {"GatedRepo": 403, "RepoNotFound": 404, "RevisionNotFound": 404}[state.fault]
                self.reply(code, b"{}", {"X-Error-Code": state.fault}, body)
            elif path.startswith("/api/models/org/tiny"):
                files = sorted(f for f in state.folder.iterdir() if f.is_file())
                if "/tree/" in path:
                    entries = [
                        {
                            "type": "file",
                            "path": f.name,
                            "size": f.stat().st_size,
                            "oid": "0" * 40,
                            **lfs(f),
                        }
                        for f in files
                    ]
                    self.reply(200, json.dumps(entries).encode(), {}, body)
                    return
                siblings = [
                    {"rfilename": f.name, "size": f.stat().st_size, "blobId": "0" * 40, **lfs(f)}
                    for f in files
                ]
                info = {
                    "id": "org/tiny",
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "cardData": state.card,
                }
                self.reply(200, json.dumps(info).encode(), {}, body)
            elif "/resolve/" in path and (state.folder / path.rpartition("/")[2]).is_file():
                self.send_file(state.folder / path.rpartition("/")[2], body)
            else:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

        def send_file(self, file: Path, body: bool) -> None:
            data = file.read_bytes()
            headers = {
                "ETag": f'"{digest(file)}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
                "X-Linked-Size": str(len(data)),
            }
            wanted = self.headers.get("Range")
            code = 200
            if wanted:
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                last = min(int(end or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
                data, code = data[int(start) : last + 1], 206
            if body:
                state.bytes_sent[file.name] = state.bytes_sent.get(file.name, 0) + len(data)
            self.reply(code, data, headers, body)

        def reply(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    def digest(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def lfs(file: Path) -> dict[str, Any]:
        if file.suffix != ".safetensors":
            return {}
        size = file.stat().st_size
        return {
            "lfs": {"sha256": digest(file), "oid": digest(file), "size": size, "pointerSize": 100}
        }

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def weights_sent(hub: FakeHub) -> int:
    return sum(n for name, n in hub.bytes_sent.items() if name.endswith(".safetensors"))


def test_sizes_and_refusals_cost_headers_only(hub: FakeHub) -> None:
    total = sum(f.stat().st_size for f in hub.folder.glob("*.safetensors"))
    table = hub.run("convert", "org/tiny", "--json")
    assert table.returncode == 2, table.stderr
    assert json.loads(table.stdout)["sizes"][-1]["label"] == "(unquantized)"
    dry = hub.run("convert", "org/tiny", "--budget", "5bpw", "--dry-run", "--low-disk", "--json")
    assert dry.returncode == 0, dry.stderr
    said = json.loads(
        dry.stdout
    )  # twice, since there is no profile; but on the disk both shards once
    assert (
        1.9 * total < said["download"] < 2.1 * total
        and said["disk"] <= said["bytes"] + 1.01 * total
    )
    refused = hub.run("convert", "org/tiny", "--budget", "10KB")
    assert refused.returncode == 1 and "too small" in refused.stderr
    assert (
        weights_sent(hub) <= 3 * 2 * 100_001
    )  # huggingface_hub reads the first 100 kB of each shard
    assert total > 2 * 100_001
    assert not any((hub.home / "hub").rglob("*.safetensors"))


def test_a_hub_model_is_converted_and_its_profile_found_again(hub: FakeHub) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(bytes(1000))
    (hub.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nthe original's page")
    done = hub.run("convert", "org/tiny", "--budget", "5bpw", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    name = "tiny-mint-5bpw"  # what the plan reaches, to two places
    assert (
        data["path"] == name and 4.995 < data["bits_per_weight"] < 5 and data["revision"] == COMMIT
    )
    assert "pytorch_model.bin" not in hub.bytes_sent
    card = (hub.home / name / "README.md").read_text()
    assert "license: apache-2.0" in card and "the original's page" not in card
    assert (
        "base_model: org/tiny" in card
        and "base_model_relation: quantized" in card
        and COMMIT in card
    )
    again = hub.run("convert", "org/tiny", "--json")
    assert json.loads(again.stdout)["sizes"][0]["loss"] is not None
    offline = hub.run("convert", "org/tiny", "--budget", "6bpw", "--json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


@pytest.mark.parametrize(
    ("card", "instead"),
    [({"base_model": ["org/original"]}, "give org/original"), ({}, "give the original checkpoint")],
)
def test_a_repository_of_gguf_files_names_the_original(
    hub: FakeHub, card: dict[str, Any], instead: str
) -> None:
    for shard in hub.folder.glob("*.safetensors*"):
        shard.unlink()
    (hub.folder / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF")
    hub.card = card
    done = hub.run("convert", "org/tiny", "--budget", "5bpw")
    assert done.returncode == 1 and "GGUF files only" in done.stderr and instead in done.stderr, (
        done.stderr
    )


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("GatedRepo", "gated"),
        ("RepoNotFound", "no such model"),
        ("RevisionNotFound", "revision does not exist"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(hub: FakeHub, fault: str, sentence: str) -> None:
    hub.fault = fault
    done = hub.run("convert", "org/tiny@v9", "--budget", "5bpw")
    assert (
        done.returncode == 1 and sentence in done.stderr and len(done.stderr.splitlines()) == 1
    ), done.stderr


def test_a_transfer_that_breaks_off_is_one_sentence() -> None:
    class TransportError(Exception): ...

    class WriteTimeout(TransportError): ...

    for error in (
        WriteTimeout("slow"),
        RuntimeError("Task error: CAS Client Error: Reqwest Error"),
    ):
        assert "Hugging Face Hub" in str(explain(error))
    assert explain(RuntimeError("shapes differ")) is None


@pytest.mark.parametrize(
    ("here", "wanted"), [(True, False), (False, True), (True, True), (None, True)]
)
def test_a_repository_is_as_private_as_it_is_said_to_be(
    here: bool | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    class Api:
        def whoami(self) -> None: ...

        def repo_info(self, repo: str) -> SimpleNamespace:
            if here is None:
                raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
            return SimpleNamespace(private=here)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    if here is (not wanted):
        with pytest.raises(MintError, match="exists and is"):
            check_upload("me/mine", private=wanted)
    else:
        check_upload("me/mine", private=wanted)


def test_an_upload_leaves_no_shard_of_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, **more: Any) -> str:
            return f"page-of-{repo}"

        def upload_folder(self, **more: Any) -> None:
            asked.update(more)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert upload(tmp_path, "me/mine", private=True) == "page-of-me/mine"
    old = (
        "model-00004-of-00004.safetensors",
        "model.safetensors.index.json",
        "mint-refined.json",
        "README.md",
        "own.txt",
    )
    gone = [
        name for name in old if any(fnmatch(name, pattern) for pattern in asked["delete_patterns"])
    ]
    assert gone == list(old[:3])


def test_offline_and_unreachable_are_one_sentence(hub: FakeHub) -> None:
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = hub.run("convert", "org/tiny", "--budget", "5bpw", **env)
        assert done.returncode == 1 and "cannot be reached" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_cache_without_a_tokenizer_is_completed(hub: FakeHub) -> None:
    """Another program may have left config and weights only; who has all needs no network."""
    snapshot = hub.fill_cache()
    found = hub.run("doctor", "org/tiny", HF_HUB_OFFLINE="1")
    assert found.returncode == 1 and "not in mlx-lm's layout" in found.stderr
    for file in snapshot.glob("tokenizer*.json"):
        file.unlink()
    done = hub.run("convert", "org/tiny", "--budget", "5bpw")
    assert done.returncode == 0, done.stderr


def test_a_damaged_index_in_the_cache_is_one_sentence(hub: FakeHub) -> None:
    (hub.fill_cache() / "model.safetensors.index.json").write_text("{")
    done = hub.run("convert", "org/tiny", "--budget", "5bpw")
    assert done.returncode == 1 and "is not a safetensors index" in done.stderr, done.stderr


def test_files_that_the_index_does_not_tell_of(hub: FakeHub) -> None:
    """A second copy of the weights is found before the download; shards without an index are one
    sentence.
    """
    shard = next(hub.folder.glob("*.safetensors"))
    shutil.copyfile(shard, hub.folder / "model.fp32-copy.safetensors")
    done = hub.run("convert", "org/tiny", "--budget", "5bpw", "--dry-run")
    assert done.returncode == 1 and "two copies of its weights" in done.stderr, done.stderr
    (hub.folder / "model.fp32-copy.safetensors").unlink()
    (hub.folder / "model.safetensors.index.json").unlink()
    done = hub.run("convert", "org/tiny", "--budget", "5bpw")
    assert done.returncode == 1 and "have no index" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["models/My--Model", "org/name.git", "./nowhere", "~nouser/x"])
@pytest.mark.parametrize("command", ["doctor", "inspect", "profile"])
def test_names_that_are_none(cli: Cli, command: str, name: str) -> None:
    refused = cli(command, name)
    assert refused.code == 1
    assert len(refused.err.splitlines()) == 1
    assert "does not exist" in refused.err or "check the spelling" in refused.err


def test_a_half_downloaded_model_is_one_sentence(hub: FakeHub) -> None:
    (hub.fill_cache() / "model-00002-of-00002.safetensors").unlink()
    done = hub.run("convert", "org/tiny", "--budget", "5bpw", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "not complete in the local cache" in done.stderr


def test_a_repository_lends_what_it_keeps(hub: FakeHub, tmp_path: Path) -> None:
    """Plan, profile and sensitivity come from the Hub as one small file each; what is missing is
    one sentence.
    """
    absent = hub.run("allocate", "org/tiny", "--budget", "5bpw")
    assert absent.returncode == 1 and "org/tiny holds no mint-profile.json" in absent.stderr
    made = convert.convert(
        str(hub.folder), "5bpw", tmp_path / "made", effort="balanced", smoke=False
    )
    for name in ARTIFACTS:
        shutil.copyfile(tmp_path / "made" / name, hub.folder / name)
    hub.bytes_sent.clear()
    for more in ((), ("--sensitivity", "org/tiny")):
        plan = hub.run("allocate", "org/tiny", *more, "--budget", "5bpw", "--json")
        assert plan.returncode == 0, plan.stderr
        assert json.loads(plan.stdout)["layers"] == {
            path: str(config) for path, config in made.plan.choice.items()
        }
    assert set(hub.bytes_sent) == {"mint-profile.json", "mint-sensitivity.npz"}
    offline = hub.run("sweep", "org/tiny", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert (
        offline.returncode == 1
        and "holds no" not in offline.stderr
        and "Traceback" not in offline.stderr
    )


def test_the_doctor_knows_what_our_own_plan_keeps(hub: FakeHub, tmp_path: Path) -> None:
    """Also where another program downloaded all but the plan."""
    made = convert.convert(str(hub.folder), "12bpw", tmp_path / "made", effort="fast", smoke=False)
    assert any(not config.quantized for config in made.plan.choice.values())
    hub.folder = tmp_path / "made"
    first = hub.run("doctor", "org/tiny")
    shutil.rmtree(hub.home / "hub")
    (hub.fill_cache() / "mint-plan.yaml").unlink()
    second = hub.run("doctor", "org/tiny")
    for found in (first, second):
        assert "nothing is wrong" in found.stdout, found.stdout + found.stderr


def test_low_disk_has_a_shard_or_two_at_a_time_and_writes_the_same(
    hub: FakeHub, make: Maker, tmp_path: Path
) -> None:
    """Shard by shard, fast (two downloads) and with a plan (one); nothing of them stays, and the
    bytes are the same.
    """
    whole, low, planned = (tmp_path / name for name in ("whole", "low", "planned"))
    fast = hub.run(
        "convert", "org/tiny", "--budget", "5bpw", "--no-smoke", "--low-disk", "-o", str(low)
    )
    assert fast.returncode == 0, fast.stderr
    assert "downloaded twice" in fast.stderr
    sizes = {f.name: f.stat().st_size for f in hub.folder.glob("*.safetensors")}
    assert sum(hub.bytes_sent.get(name, 0) for name in sizes) <= 2.5 * sum(
        sizes.values()
    )  # and the headers
    assert not list((hub.home / "hub").rglob("*.safetensors"))
    hub.bytes_sent.clear()
    plan = ("--plan", str(low / "mint-plan.yaml"))
    done = hub.run("convert", "org/tiny", *plan, "--no-smoke", "--low-disk", "-o", str(planned))
    assert done.returncode == 0 and "downloaded once" in done.stderr, done.stderr
    assert sum(hub.bytes_sent.get(name, 0) for name in sizes) <= 1.5 * sum(sizes.values())
    known = hub.run("convert", "org/tiny", "--budget", "6bpw", "--no-smoke", "--low-disk")
    assert known.returncode == 0 and "downloaded once" in known.stderr, known.stderr
    convert.convert(str(hub.folder), plan=low / "mint-plan.yaml", out=whole, smoke=False)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (
            (low / name).read_bytes()
            == (whole / name).read_bytes()
            == (planned / name).read_bytes()
        )


def test_low_disk_is_refused_where_the_model_is_run(hub: FakeHub) -> None:
    told = hub.run("convert", "org/tiny", "--budget", "5bpw", "--low-disk", "--quantizer", "gptq")
    assert told.returncode == 2 and "--effort fast" in told.stderr
