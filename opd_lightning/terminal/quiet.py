"""Silence for what libraries say that a user of this program can do nothing about."""

from __future__ import annotations

import logging
import os
import re
import warnings

from opd_lightning.terminal.progress import is_watched, say

# Part of the message, and why it does not concern the user.
_NOT_FOR_USERS = (
    "does not have many workers",  # loaders here write rollouts; there is nothing to parallelise
    "sync_dist=True",  # what is logged comes out of torchmetrics, added up over ranks already
    "Total length of `list` across ranks is zero",  # training without validation is a choice
    "`isinstance(treespec, LeafSpec)` is deprecated",  # Lightning against this torch
    "was deprecated in v4",  # Lightning against this jsonargparse
    "assuming the intent is to load in a single process",  # it is: export reads shards alone
    "The dirpath has changed from",  # ModelCheckpoint, when a checkpoint is but measured
    "but have no logger configured",  # nor has a measurement, which prints what it finds
    "which exceeds buffer_size_bytes",  # vLLM about a tensor that is sent alone, as it must be
    "`torch.distributed.reduce_op` is deprecated",  # vLLM against this torch
)


# The same where no job was asked for: a machine may have SLURM and not be used through it.
_NOT_OUTSIDE_OF_JOBS = ("The `srun` command is available on your system but is not used",)

# Lightning greets with the hardware that it did not find, and ends with what the bar shows.
_NO_NEWS = (
    "Tip:",
    "TPU available: False",
    "HPU available: False",
    "`Trainer.fit` stopped: `max_steps=",
)


def quiet_libraries() -> None:
    """Call once, before training starts; warnings that a user can act on still show."""
    if not is_watched():
        # Read when tqdm and the hub's library are imported, by our child processes, too.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    outside = () if "SLURM_JOB_ID" in os.environ else _NOT_OUTSIDE_OF_JOBS
    for message in (*_NOT_FOR_USERS, *outside):
        warnings.filterwarnings("ignore", message=f"(?s).*{re.escape(message)}")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_news)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    logging.lastResort = _AboveBars(logging.WARNING)  # of loggers without a handler, as ours are


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def _is_news(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _NO_NEWS)


def only_warnings() -> None:
    """For programs that train as one of their steps: no greetings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
