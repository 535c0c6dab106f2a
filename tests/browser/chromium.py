"""A headless Chromium, driven over a pipe by its own DevTools protocol; nothing to install besides the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
PATIENCE = 120.0
"""Seconds without a word after which the browser is taken for stuck."""


def executable() -> str:
    """Return the browser's path; `make test-browser` installs it."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("no Chromium on this machine; `make test-browser` installs Debian's")


class Chromium:
    """One browser with one page.

    Attributes:
        events: What the page told so far, as (method, parameters).
    """

    def __init__(self, profile: Path) -> None:
        reads, their_write = os.pipe()
        their_read, self._writes = os.pipe()
        self._reads = reads

        def arrange() -> None:  # Chromium reads commands from descriptor 3 and writes to 4
            kept_read, kept_write = os.dup(their_read), os.dup(their_write)
            os.dup2(kept_read, 3)
            os.dup2(kept_write, 4)

        self._log = (profile.parent / f"{profile.name}.log").open("wb")
        self._process = subprocess.Popen(
            [executable(), *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=arrange,
            close_fds=False,
            stdout=self._log,
            stderr=self._log,
        )
        os.close(their_read)
        os.close(their_write)
        self._rest = b""
        self._count = 0
        self._session = None
        self.events: list[tuple[str, dict]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """Send a command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def wait(self, method: str) -> None:
        """Return when the page has told an event of this kind since the last ``clear``."""
        while all(told != method for told, _ in self.events):
            self._next()

    def told(self, method: str) -> list[dict]:
        return [parameters for name, parameters in self.events if name == method]

    def open(self, path: Path, *, width: int, scheme: str = "light", media: str = "screen") -> None:
        """Load a file at a width (CSS pixels), as a telephone or a desk would show it."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def evaluate(self, expression: str):
        """Return the value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> bytes:
        """Write the whole page as PNG and return its bytes."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        image = base64.b64decode(shot["data"])
        path.write_bytes(image)
        return image

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=PATIENCE)
        os.close(self._reads)
        os.close(self._writes)
        self._log.close()

    def _next(self) -> dict:
        """Return the next message; events are kept."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], deadline - time.monotonic())
            chunk = os.read(self._reads, 2**20) if ready else b""
            assert chunk, f"the browser says nothing more; see {self._log.name}"
            self._rest += chunk
        raw, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(raw)
        if "method" in message:
            self.events.append((message["method"], message.get("params", {})))
        return message
