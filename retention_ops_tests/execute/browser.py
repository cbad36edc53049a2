"""A real headless Chromium, told what to do over its DevTools protocol: open a page, read its text, take its picture."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    def __init__(self, socket: ClientConnection):
        self._socket = socket
        self._numbers = itertools.count(1)

    def call(self, method: str, **params: object) -> dict:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> object:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, url: str, *wanted: str, seconds: float = 60) -> str:
        """The page's text once all of `wanted` stand in it."""
        self.call("Page.navigate", url=url)
        deadline, text = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            text = str(self.run("document.body ? document.body.innerText : ''"))
            missing = [word for word in wanted if word not in text]
            if not missing:
                time.sleep(1.5)  # what is still being drawn
                return str(self.run("document.body.innerText"))
            time.sleep(0.5)
        raise AssertionError(f"{url} never showed {missing}; it says:\n{text[:3000]}")

    def drag(self, x: int, y: int, to_y: int) -> None:
        """Moves what stands at (x, y), a divider for instance, up or down."""
        steps = (("mouseMoved", y), ("mousePressed", y), ("mouseMoved", (y + to_y) // 2), ("mouseMoved", to_y), ("mouseReleased", to_y))
        for kind, at in steps:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=at, button="left", buttons=1, clickCount=1)
        time.sleep(1)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def chromium(profile: Path, width: int = 1400, height: int = 900) -> Iterator[Page]:
    """One tab of a browser of its own, `profile` being an empty folder."""
    process = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
         "--remote-debugging-port=0", f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    try:
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().strip()):
            assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.2)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            tab = next(found for found in json.load(answer) if found["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None, compression=None, proxy=None) as socket:
            page = Page(socket)
            page.call("Page.enable")
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
