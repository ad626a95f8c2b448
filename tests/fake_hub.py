"""The Hugging Face Hub, played by a small local server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mint_mlx.cli import main

COMMIT = "c" * 40


FAULTS = {"GatedRepo": 403, "RepoNotFound": 404, "RevisionNotFound": 404}


@dataclass
class FakeHub:
    """What the server holds, and the bytes that it has sent of each file.

    Attributes:
        killed_at: a file, and which of its downloads: the process that `run` started is killed in
            the middle of it.
    """

    folder: Path
    fault: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    bytes_sent: dict[str, int] = field(default_factory=dict)
    url: str = ""
    home: Path = Path()
    killed_at: tuple[str, int] | None = None
    downloads: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def fill_cache(self) -> Path:
        """Fill the cache as a whole download would; returns the snapshot."""
        cache = self.home / "hub" / "models--org--tiny"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(COMMIT)
        shutil.copytree(self.folder, cache / "snapshots" / COMMIT)
        return cache / "snapshots" / COMMIT

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against this hub: in this process, unless that shall be killed."""
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        } | env
        if args[0] == "convert" and "--plan" not in args:
            args = (*args, "--effort", "fast")
        if self.killed_at is None:
            return self._run_here(args, settings)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mint_mlx", *args],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.home,
        )
        out, err = self.process.communicate(timeout=120)
        return subprocess.CompletedProcess(args, self.process.returncode, out, err)

    def _run_here(
        self, args: tuple[str, ...], settings: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line in this process, with what huggingface_hub read at its import."""
        from huggingface_hub import constants

        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as stopped,
        ):
            patch.setattr(constants, "ENDPOINT", settings["HF_ENDPOINT"])
            template = settings["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_CACHE", f"{settings['HF_HOME']}/hub")
            patch.setattr(constants, "HF_HUB_OFFLINE", settings["HF_HUB_OFFLINE"] == "1")
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.chdir(self.home)
            patch.setattr(sys, "argv", ["mint-mlx", *args])
            main.main()
        code = int(stopped.value.code or 0)
        return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


class Handler(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks of a Hub: a repository's files, and their bytes."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.partition(f"/{COMMIT}/")[2] or path.rpartition("/")[2]
        if self.hub.fault:
            headers = {"X-Error-Code": self.hub.fault}
            self.reply(FAULTS[self.hub.fault], b"{}", headers, body)
        elif path.startswith("/api/models/org/tiny"):
            listing = self.tree() if "/tree/" in path else self.info()
            self.reply(200, json.dumps(listing).encode(), {}, body)
        elif "/resolve/" in path and (self.hub.folder / name).is_file():
            self.send_file(self.hub.folder / name, body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def files(self) -> list[Path]:
        return sorted(f for f in self.hub.folder.rglob("*") if f.is_file())

    def name(self, file: Path) -> str:
        return file.relative_to(self.hub.folder).as_posix()

    def tree(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": self.name(f),
                "size": f.stat().st_size,
                "oid": "0" * 40,
                **lfs(f),
            }
            for f in self.files()
        ]

    def info(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": self.name(f), "size": f.stat().st_size, "blobId": "0" * 40, **lfs(f)}
            for f in self.files()
        ]
        return {
            "id": "org/tiny",
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
            "cardData": self.hub.card,
        }

    def send_file(self, file: Path, body: bool) -> None:
        data = file.read_bytes()
        headers = {
            "ETag": f'"{digest(file)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(data)),
        }

        # A part of the file, where one is asked for.
        wanted = self.headers.get("Range")
        code = 200
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            data = data[int(start) : last + 1]
            code = 206

        if body:
            sent = self.hub.bytes_sent
            sent[file.name] = sent.get(file.name, 0) + len(data)
        downloads = self.hub.downloads
        if body and not wanted:
            downloads[file.name] = downloads.get(file.name, 0) + 1
        if body and not wanted and self.hub.killed_at == (file.name, downloads[file.name]):
            assert self.hub.process is not None
            self.reply(code, data[: len(data) // 2], headers, body, len(data))
            self.wfile.flush()
            self.hub.process.kill()
        else:
            self.reply(code, data, headers, body)

    def reply(
        self, code: int, data: bytes, headers: dict[str, str], body: bool, size: int | None = None
    ) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(size or len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def lfs(file: Path) -> dict[str, Any]:
    """What the Hub says besides of a file that is stored in LFS: weights only."""
    if file.suffix != ".safetensors":
        return {}
    size = file.stat().st_size
    return {"lfs": {"sha256": digest(file), "oid": digest(file), "size": size, "pointerSize": 100}}


@contextmanager
def serve_hub(folder: Path, home: Path) -> Iterator[FakeHub]:
    """Serve a checkpoint as org/tiny; `home` is the HF_HOME of what runs against it."""
    hub = FakeHub(folder, home=home)
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
