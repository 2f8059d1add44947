"""Loading of lm-eval's tasks, and isolation from its output and random state."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng

from opd_lightning.errors import UserError

# lm-eval's defaults, so that figures agree with its command line.
RANDOM_SEED, NUMPY_SEED, EXAMPLES_SEED = 0, 1234, 1234

_VERBOSE = ("lm_eval", "datasets", "evaluate", "huggingface_hub")


def check_installed() -> None:
    """Raise UserError if lm-eval is not installed; import nothing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "data.tasks: got tasks of lm-evaluation-harness, which is not installed; run: "
            'pip install -e ".[lm-eval]"'
        )


@contextmanager
def isolated() -> Iterator[None]:
    """Silence the libraries and seed them alike; restore random states and log levels after."""
    loggers = [logging.getLogger(name) for name in _VERBOSE]
    levels = [logger.level for logger in loggers]
    # lm-eval's bootstraps would fork this process, with its threads and devices.
    os.environ["DISABLE_MULTIPROC"] = "1"
    silence = io.StringIO()
    try:
        with isolate_rng(), redirect_stdout(silence), redirect_stderr(silence):
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            random.seed(RANDOM_SEED)
            np.random.seed(NUMPY_SEED)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load(name: str, include_path: str | None) -> dict[str, Any]:
    """Load a task or a group with its documents, as lm-eval's `TaskManager.load` returns it.

    Listing lm-eval's own tasks takes seconds. So `include_path` is searched alone first, and
    together with them only if needed: its groups may contain some of theirs.
    """
    if include_path is None:
        return _load(_manager(None, with_defaults=True), name)
    include_path = os.path.expanduser(include_path)
    if not Path(include_path).is_dir():
        raise UserError(f"include_path: got {include_path!r}, expected a folder of tasks")
    own = _manager(include_path, with_defaults=False)
    if name in own.all_tasks:
        try:
            return _load(own, name)
        except UserError:
            if name not in own.all_groups:
                raise
    return _load(_manager(include_path, with_defaults=True), name)


def _load(manager: Any, name: str) -> dict[str, Any]:
    if name not in manager.all_tasks:
        raise UserError(
            f"got {name!r}, which lm-eval does not know; `lm-eval ls tasks` lists what it knows, "
            "include_path is for your own"
        )
    if name in manager.all_tags:
        raise UserError(
            f"got {name!r}, which stands for several tasks and has no score of its own; name one "
            "of them, or a group that adds them up"
        )
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # datasets and tasks raise errors of any type
        raise UserError(
            f"cannot load {name!r}: {reason(error)}; its data must be on this machine, or at a "
            "hub that it reaches"
        ) from error
    return loaded


@cache
def _manager(include_path: str | None, *, with_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=with_defaults)


def reason(error: Exception) -> str:
    """Format another library's error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
