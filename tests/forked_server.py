"""`opd serve` whose engine process is forked, and so spared a second import of vLLM.

vLLM forks it on GPUs. On CPUs it spawns it, because a fork loses the threads of OpenMP; tests have
one thread. `tests/servers.py` also starts servers as a user does.
"""

import multiprocessing
import sys
from typing import Any

from opd_lightning.cli import main


def fork() -> None:
    """Let contexts that spawn processes fork them."""
    get_context: Any = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking


if __name__ == "__main__":
    fork()
    main(sys.argv[1:])
