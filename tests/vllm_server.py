"""A real vLLM server on loopback, in a process that a test may kill."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from opd_lightning.model_identity import model_identity

KEY = "a-key-for-tests"
START_SECONDS = 240  # most of it is imports, slow on a busy machine


class VLLMServer:
    """Serves one model folder, as `opd serve` would: float32, token ids in and out, with a key."""

    def __init__(self, folder: Path, log: Path, *, max_length: int, max_batch_tokens: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *("--served-model-name", model_identity(str(folder)), "--tokens-only"),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", str(max_length), "--max-logprobs", "64"),
            *("--max-num-batched-tokens", str(max_batch_tokens)),
            *("--distributed-executor-backend", "uni", "--generation-config", "vllm"),
        ]
        self.start()

    def start(self) -> None:
        """In a session of its own, so that `kill` reaches vLLM's engine process too."""
        more = {"VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **more},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        self.kill()
        raise AssertionError(f"the server did not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """As a lost machine: no goodbye."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
