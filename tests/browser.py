"""A headless Chromium, spoken to by the WebDriver protocol: opens a page as a reader sees it."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

NAMES = ("chromedriver", "chromium.chromedriver")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def find_driver() -> str | None:
    """The path of Chromium's driver; None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One session of a driver."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = {"args": list(OPTIONS)}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._post("session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"session/{session['sessionId']}"

    def _post(self, path: str, data: dict[str, Any]) -> Any:
        request = Request(
            f"{self._address}/{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        data = {"cmd": command, "params": parameters}
        return self._post(f"{self._session}/goog/cdp/execute", data)

    def open(self, page: Path, width: int, dark: bool = False) -> None:
        """Open a file in a window of a width in pixels; it may load nothing from the network."""
        self.cdp("Network.enable")
        self.cdp("Network.setBlockedURLs", urls=["http://*", "https://*"])
        self.cdp("Emulation.setScrollbarsHidden", hidden=True)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self._post(f"{self._session}/url", {"url": page.absolute().as_uri()})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._post(f"{self._session}/execute/sync", {"script": script, "args": []})

    def log(self) -> list[str]:
        """Messages of the console since the last call."""
        entries = self._post(f"{self._session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def picture(self) -> bytes:
        """The whole page as PNG."""
        size = self.run(
            "const e = document.documentElement; return [e.scrollWidth, e.scrollHeight]"
        )
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        taken = self.cdp("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(taken["data"])


@contextmanager
def browser(driver: str) -> Iterator[Browser]:
    """A browser that is closed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address)
        session = Browser(address)
        try:
            yield session
        finally:
            with urlopen(Request(f"{address}/{session._session}", method="DELETE"), timeout=30):
                pass
    finally:
        process.terminate()
        process.wait(30)


def _wait(address: str) -> None:
    """Wait until the driver answers."""
    for _ in range(100):
        try:
            with urlopen(f"{address}/status", timeout=5):
                return
        except URLError:
            time.sleep(0.1)
    raise TimeoutError("Chromium's driver doesn't answer")
