"""Headless Chromium, controlled through the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Visible text of the page, web components included, with single spaces.
READ = r"""
(function read(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent + " ";
  if (["SCRIPT", "STYLE", "TEMPLATE"].includes(node.nodeName)) return "";
  const root = node.shadowRoot || node;
  return [...root.childNodes, ...(node.shadowRoot ? node.childNodes : [])].map(read).join("");
})(document.documentElement).replace(/\s+/g, " ")
"""


class Page:
    """Page of the browser. Commands and answers are JSON, ended by a zero byte, over two pipes."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = os.fdopen(write, "wb"), os.fdopen(read, "rb")
        self._last = 0
        self._session: dict[str, str] = {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.ask("Page.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters, **self._session}
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _message(self) -> bytes:
        received = bytearray()
        while not received.endswith(b"\0"):
            byte = self._read.read(1)
            if not byte:
                raise RuntimeError("the browser is gone")
            received += byte
        return bytes(received[:-1])

    def open(self, address: str) -> None:
        self.ask("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """Run a script and return its value."""
        done = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        return done["result"].get("value")

    def wait_for(self, script: str, enough: Callable[[Any], bool], seconds: float = 90) -> Any:
        """Run a script until `enough` accepts its value or time is up; return the value."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.run(script)
            if (value is not None and enough(value)) or time.monotonic() > deadline:
                return value
            time.sleep(0.5)

    def screenshot(self, path: Path) -> None:
        picture = self.ask("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(picture))


def chromium() -> str | None:
    """Return the path of the browser; None if it is not installed."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def browsing(profile: Path, width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """Start a browser and yield its page; the browser ends with the block."""
    program = chromium()
    assert program is not None
    theirs, ours = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    size, home = f"--window-size={width},{height}", f"--user-data-dir={profile}"
    command = [program, *options, "--remote-debugging-pipe", size, home, "about:blank"]
    # The browser reads descriptor 3 and writes to 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{ours[1]}', "bash", *command]
    with (profile.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            shell, pass_fds=(theirs[0], ours[1]), stdout=log, stderr=log, start_new_session=True
        )
    os.close(theirs[0])
    os.close(ours[1])
    try:
        yield Page(theirs[1], ours[0])
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
