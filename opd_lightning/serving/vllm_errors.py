"""Translation of vLLM's exceptions that a user can act on into one-line errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd_lightning.errors import RunStoppedError, UserError


@contextmanager
def start_errors() -> Iterator[None]:
    """Translate errors while vLLM starts: refused settings and lack of memory.

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
    """Translate errors while vLLM loads weights or generates: lack of memory, dead processes."""
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
    from pydantic import ValidationError  # raised by vLLM's settings, with much additional text

    messages = [str(error)]
    if isinstance(error, ValidationError):
        messages = [one["msg"] for one in error.errors()]
    text = " ".join("; ".join(messages).split())
    return text if len(text) <= 400 else text[:397] + "..."
