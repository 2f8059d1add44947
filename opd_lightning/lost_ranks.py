"""What is left to say when another process of a run is gone."""

from __future__ import annotations

import torch.distributed as dist

# Of gloo and NCCL, when the other end of a connection is dead or silent.
SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "remote process exited",
)


def last_words(error: BaseException) -> str | None:
    """One line for an exception that a lost process caused here; None for any other."""
    text = " ".join(str(error).split())
    backend = isinstance(error, dist.DistError) or "gloo/" in text
    signs = [sign for sign in SIGNS if sign in text]
    if not backend or not signs:
        return None
    rank = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
    return (
        f"{rank}another process of the run is gone, or does not answer ({signs[0]}); what it has "
        "said, above or in its own log, is the reason; go on from the last checkpoint"
    )
