"""What vLLM raises for reasons that a user can act on, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd_lightning.errors import RunStoppedError, UserError


@contextmanager
def start_errors() -> Iterator[None]:
    """While vLLM starts: settings that it refuses, and memory that is not there.

    Any other exception is a bug and keeps its traceback.
    """
    try:
        with run_errors():
            yield
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword argument" not in str(error):
            raise
        raise UserError(
            f"engine VLLMEngine: vLLM does not start: {_one_line(error)}; change the engine's "
            "arguments or engine_args"
        ) from error


@contextmanager
def run_errors() -> Iterator[None]:
    """While vLLM takes weights or writes: it is out of memory, or its own processes are dead."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunStoppedError(
            f"engine VLLMEngine: out of GPU memory: {_one_line(error)}; lower its "
            "gpu_memory_utilization or max_num_seqs, or set sleep_while_training, then go on from "
            "the last checkpoint"
        ) from error
    except EngineDeadError as error:
        raise RunStoppedError(
            "engine VLLMEngine: vLLM's own processes have ended, and have said why above; go on "
            "from the last checkpoint"
        ) from error


def _one_line(error: Exception) -> str:
    from pydantic import ValidationError  # vLLM's settings are pydantic's, who says much besides

    said = [str(error)]
    if isinstance(error, ValidationError):
        said = [one["msg"] for one in error.errors()]
    text = " ".join("; ".join(said).split())
    return text if len(text) <= 400 else text[:397] + "..."
