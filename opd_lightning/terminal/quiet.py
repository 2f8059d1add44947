"""Suppression of library messages that users of this program cannot act on."""

from __future__ import annotations

import logging
import os
import re
import warnings

from opd_lightning.terminal.progress import is_watched, say

# Part of the message, and the reason why it does not concern the user.
_SUPPRESSED_WARNINGS = (
    "does not have many workers",  # loaders generate rollouts; nothing to parallelise
    "sync_dist=True",  # logged values are torchmetrics, already reduced over ranks
    "Total length of `list` across ranks is zero",  # training without validation is allowed
    "`isinstance(treespec, LeafSpec)` is deprecated",  # Lightning against this torch
    "was deprecated in v4",  # Lightning against this jsonargparse
    "assuming the intent is to load in a single process",  # true of export, which reads shards
    "The dirpath has changed from",  # ModelCheckpoint, when a checkpoint is only evaluated
    "Previous log files in this directory will be deleted",  # run/csv_log.py keeps them
    "but have no logger configured",  # an evaluation has none and prints its results
    "`loftq_config` specified but will be ignored",  # peft; jsonargparse fills the empty default
    "which exceeds buffer_size_bytes",  # vLLM, about a tensor that is sent alone, as intended
    "`torch.distributed.reduce_op` is deprecated",  # vLLM against this torch
)


# Suppressed outside of SLURM jobs: a machine may have SLURM without being used through it.
_SUPPRESSED_OUTSIDE_JOBS = ("The `srun` command is available on your system but is not used",)

# Parts of Lightning's log messages about missing hardware, and about what the bar shows.
_SUPPRESSED_LOGS = (
    "Tip:",
    "TPU available: False",
    "HPU available: False",
    "`Trainer.fit` stopped: `max_steps=",
    "Detected KeyboardInterrupt, attempting graceful shutdown",  # reported in one line
)


def quiet_libraries() -> None:
    """Suppress messages that users cannot act on; call once, before training starts."""
    if not is_watched():
        # Read when tqdm and huggingface_hub are imported, also in child processes.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    outside = () if "SLURM_JOB_ID" in os.environ else _SUPPRESSED_OUTSIDE_JOBS
    for message in (*_SUPPRESSED_WARNINGS, *outside):
        warnings.filterwarnings("ignore", message=f"(?s).*{re.escape(message)}")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_shown)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    logging.lastResort = _AboveBars(logging.WARNING)  # for loggers without a handler, as here


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def _is_shown(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _SUPPRESSED_LOGS)


def only_warnings() -> None:
    """Suppress Lightning's info messages in programs of which training is one step."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
