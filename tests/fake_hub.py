"""The Hugging Face Hub, played by a small local server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


@contextmanager
def serve_hub(folder: Path, home: Path) -> Iterator[FakeHub]:
    """Serve a checkpoint as org/tiny; `home` is the HF_HOME of what runs against it."""
    state = FakeHub(folder, home=home)

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
