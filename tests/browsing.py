"""A page in chromium, driven over its DevTools protocol: what a test asks of a browser, without a
package that drives browsers.
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60  # until chromium must have said where it listens, and for every answer
# What reaches out of a page of 390 pixels, however hidden the rest of it would be.
CUT = """[...document.querySelectorAll('main *')].filter(e => !e.closest('thead, noscript')
    && e.checkVisibility() && (e.getBoundingClientRect().right > 391
    || e.getBoundingClientRect().left < -1)).map(e => e.tagName + '.' + e.className)"""


class Tab:
    """The open page: `run` evaluates JavaScript in it, `send` gives a DevTools command."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.ids = socket, itertools.count(1)
        self.asked: list[str] = []  # addresses of everything that the page fetched

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("method") == "Network.requestWillBeSent":
                self.asked.append(said["params"]["request"]["url"])
            if said.get("id") == number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]

    def run(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        said = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def key(self, key: str, text: str = "") -> None:
        """Press a key where the focus is."""
        codes = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36}
        kind = "keyDown" if text else "rawKeyDown"
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.send("Input.dispatchKeyEvent", type=kind, text=text, **pressed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def look(self, width: int = 1100, dark: bool = False, media: str = "") -> None:
        """Show the page `width` CSS pixels wide, in dark or light mode, on screen or paper."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.as_uri())
        waited = time.monotonic()
        while self.run("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() - waited < SECONDS, "the page did not load"
            time.sleep(0.05)

    def picture(self, path: Path) -> Path:
        """The whole page as a PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


def violations(opened: Tab) -> list[str]:
    """The rules of axe-core that the page breaks, each with where; skips where the environment
    variable DRIFTBOOK_AXE does not name its file axe.min.js.
    """
    script = os.environ.get("DRIFTBOOK_AXE", "")
    if not Path(script).is_file():
        pytest.skip("DRIFTBOOK_AXE names no file: get axe-core's axe.min.js from npm for this test")
    opened.run(Path(script).read_text(encoding="utf-8") + "; 1")
    found = opened.run("axe.run(document).then(said => said.violations)")
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found
        for node in one["nodes"][:5]
    ]


@contextlib.contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """A page of a chromium of its own, whose profile is in `folder`; skips where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium on PATH")
    websocket = pytest.importorskip("websocket", reason="no websocket-client, which jupyter brings")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    command += ["--remote-allow-origins=*", "about:blank"]
    told = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen(command, **told)
    try:
        port = _port(folder / "DevToolsActivePort", started)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=SECONDS) as said:
            pages = [one for one in json.load(said) if one["type"] == "page"]
        socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=SECONDS)
        opened = Tab(socket)
        opened.send("Page.enable")
        opened.send("Network.enable")
        yield opened
        socket.close()
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _port(path: Path, started: subprocess.Popen) -> int:
    """Where chromium listens, once it has written it down."""
    waited = time.monotonic()
    while not (path.is_file() and path.read_text().strip()):
        if started.poll() is not None or time.monotonic() - waited > SECONDS:
            pytest.skip("chromium does not start on this machine")
        time.sleep(0.05)
    return int(path.read_text().split()[0])
