"""A line that several processes end with, told once.

What breaks a run in its set-up breaks it everywhere. Nothing here is collective: a process may
also end alone, while the others wait for it somewhere else.
"""

from __future__ import annotations

import hashlib
import time

import torch.distributed as dist

PATIENCE = 10.0  # seconds that a process waits for others to end alike
PAUSE = 0.05


class Ending:
    """This process's, among those that end with the same line.

    Args:
        line: What is to be said.
    """

    def __init__(self, line: str) -> None:
        self._key = f"ending-{hashlib.sha256(line.encode()).hexdigest()}"
        self.is_first = self._add(1) <= 1  # rather twice than never

    def all_come(self) -> bool:
        """Whether every process of the run ends like this, each within a while."""
        if not dist.is_initialized():
            return False
        deadline = time.monotonic() + PATIENCE
        while (come := self._add(0)) < dist.get_world_size():
            if come == 0 or time.monotonic() > deadline:
                return False
            time.sleep(PAUSE)
        return True

    def _add(self, count: int) -> int:
        """How many have come, with `count` more; 0 if the process that counts is gone."""
        if not dist.is_initialized():
            return count
        try:
            store = dist.distributed_c10d._get_default_store()
            return int(store.add(self._key, count))
        except RuntimeError:
            return 0
