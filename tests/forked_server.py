"""`opd serve` forked from a process that has imported vLLM: half a minute of CPU time once.

The server's engine process is forked too. vLLM does so on GPUs; on CPUs it spawns it, because a
fork loses the threads of OpenMP, of which tests have none. `tests/servers.py` also starts servers
as a user does.
"""

import multiprocessing
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from opd_lightning.cli import main
from opd_lightning.serving.vllm_process import vllm_unavailable
from opd_lightning.terminal.quiet import quiet_libraries
from tests import processes, warm_parent

# What a server and its engine import by the first answer.
PRELOADED = (
    "opd_lightning.commands.parsers",
    "opd_lightning.serving.serve",
    "opd_lightning.serving.worker",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.model_executor.models.qwen3",
)
ON_CPU = ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn")
CALL = "call"  # in place of a command of `opd`


@cache
def parent() -> processes.Prepared:
    """Return the process that servers are forked from; it ends with this one."""
    return processes.Prepared(__name__)


def call(function: Callable[..., None], *arguments: Any) -> processes.Process:
    """Like `processes.call`, with vLLM imported."""
    return parent().fork(__name__, CALL, processes.pickled(function, *arguments))


def run_as_written() -> None:
    """Let vLLM's engines of this process, before the first, compile no function.

    vLLM compiles the one that ranks tokens also where it is told to be eager: two CPU seconds.
    """
    from vllm.platforms import current_platform

    current_platform.simple_compile_backend = "eager"


def _preload() -> None:
    quiet_libraries()
    if reason := vllm_unavailable():
        raise RuntimeError(reason)
    run_as_written()
    warm_parent.import_all((*PRELOADED, *(() if torch.cuda.is_available() else ON_CPU)))


def _fork() -> None:
    """Let contexts that spawn processes fork them."""
    get_context: Any = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking


if __name__ == "__main__":
    _preload()
    warm_parent.serve_stdin()
    if sys.argv[1] == CALL:
        processes.call_pickled(sys.argv[2])
    else:
        _fork()
        main(sys.argv[1:])
