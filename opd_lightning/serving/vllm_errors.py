"""Translation of vLLM's exceptions that a user can act on into one-line errors."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd_lightning.errors import RunStoppedError, UserError, cut


@contextmanager
def start_errors() -> Iterator[None]:
    """Translate errors while vLLM starts: refused settings, unknown models and lack of memory.

    Any other exception is a bug and keeps its traceback.
    """
    try:
        with run_errors(), model_errors("load"):
            yield
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword argument" not in str(error):
            raise
        raise UserError(
            f"engine VLLMEngine: vLLM does not start: {_one_line(error)}; change the engine's "
            "arguments or engine_args"
        ) from error


@contextmanager
def model_errors(what: str) -> Iterator[None]:
    """Translate errors that vLLM's code raises for models that it does not fully support.

    Args:
        what: Verb of the operation, for the message.
    """
    try:
        yield
    except (LookupError, AttributeError, AssertionError, NotImplementedError) as error:
        if not _is_vllms(error):
            raise
        raise UserError(
            f"engine VLLMEngine: vLLM cannot {what} this model: {type(error).__name__}: "
            f"{_one_line(error)}; use opd_lightning.rollouts.HFEngine"
        ) from error


def _is_vllms(error: Exception) -> bool:
    """Return whether the error was raised below vLLM's frames, not by this program."""
    frames = (
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    names = [name.split(".")[0] for name in frames]
    return [name for name in names if name in ("vllm", "opd_lightning")][-1:] == ["vllm"]


@contextmanager
def run_errors() -> Iterator[None]:
    """Translate errors while vLLM loads weights or generates: lack of memory, lost processes."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunStoppedError(
            f"engine VLLMEngine: out of GPU memory: {_one_line(error)}; lower its "
            "gpu_memory_utilization or max_num_seqs, or set sleep_while_training, then resume "
            "from the last checkpoint"
        ) from error
    except EngineDeadError as error:
        raise RunStoppedError(
            "engine VLLMEngine: vLLM's own processes have ended, see their messages above; "
            "resume from the last checkpoint"
        ) from error


def _one_line(error: Exception) -> str:
    from pydantic import ValidationError  # raised by vLLM's settings, with much additional text

    messages = [str(error)]
    if isinstance(error, ValidationError):
        messages = [one["msg"] for one in error.errors()]
    return cut(" ".join("; ".join(messages).split()), 400)
