"""What `opd serve` puts in front of vLLM, and behind it a few lines in vLLM's place.

`python -m tests.fuzz.checked_server MODEL FOLDER` serves until it is killed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from opd_lightning.serving.addresses import write_address
from opd_lightning.serving.authentication import KEY_FILE_VARIABLE
from opd_lightning.serving.keys import make_key_file
from tests import processes


class CheckedServer:
    """A server in a process of its own, with the interface of `tests.servers.RunningServer`."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._words = (str(model), str(folder))
        self._folder = folder
        self.log = folder / "server.log"
        make_key_file(folder / "key")
        self.key = (folder / "key").read_text().strip()
        self.restart()

    @property
    def url(self) -> str:
        return (self._folder / "address").read_text().strip()

    def wait(self) -> CheckedServer:
        return self

    def restart(self) -> CheckedServer:
        (self._folder / "address").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = processes.Process(__name__, *self._words, stdout=log, stderr=log)
        while not (self._folder / "address").exists():
            assert self.is_running(), self.log.read_text()
            time.sleep(0.05)
        return self

    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Answer as vLLM would: the ids that follow, with log-probs that depend on them."""
    body = (await receive())["body"]
    told: Any = {"success": True}
    if scope["path"] == "/inference/v1/generate":
        request = json.loads(body)
        count = request["sampling_params"].get("max_tokens") or 16
        ids = [(request["token_ids"][-1] + i) % 64 for i in range(min(count, 64))]
        content = [{"logprob": -(token + 1) / 8} for token in ids]
        told = {"choices": [{"token_ids": ids, "logprobs": {"content": content}}]}
    content_bytes = json.dumps(told).encode()
    headers = [(b"content-length", b"%d" % len(content_bytes))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content_bytes})


def main(model: str, folder: str) -> None:
    import uvicorn

    from opd_lightning.models.source import ModelSource
    from opd_lightning.serving import http_protocol
    from opd_lightning.serving.accepted import LIMITS
    from opd_lightning.serving.checked_requests import TrainerRequests
    from opd_lightning.serving.pushed_folder import PushedFolder

    os.environ[KEY_FILE_VARIABLE] = str(Path(folder) / "key")
    LIMITS.vocabulary = 64
    LIMITS.check_push = PushedFolder(ModelSource(model)).check
    LIMITS.check_push(str(Path(folder) / "pushed" / "same"))  # the first one takes its time
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        write_address(Path(folder) / "address", f"http://127.0.0.1:{sock.getsockname()[1]}")
        config = uvicorn.Config(
            TrainerRequests(answer),
            lifespan="off",
            log_level="warning",
            access_log=False,
            **http_protocol.UVICORN_OPTIONS,
        )
        uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main(*sys.argv[1:])
