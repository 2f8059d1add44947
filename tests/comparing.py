"""Comparison of an interrupted run with an uninterrupted one."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServedEvents,
)
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from opd_lightning.checkpoints.writing import META
from tests.full_run import RUN

CLOCK = ("time/", "cost/", "tokens_per_second")  # figures that differ from run to run
LATE = "savers"  # a checkpoint does not contain the record of its own saving


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the logged scalars by name, without times."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(CLOCK)
    }


def tensors(run: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Return the other logged values, texts and images, as read by TensorBoard's server."""
    events = ServedEvents(str(run), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name != "scalars"
    }


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Return the paths at which two checkpoints differ in any bit, without times."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{at}: keys {one.keys() ^ other.keys()}"] if one.keys() != other.keys() else []
        for key in one.keys() & other.keys():
            if not str(key).startswith((*CLOCK, LATE)):
                found += differences(one[key], other[key], f"{at}/{key}")
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{at}: {len(one)} and {len(other)} entries"]
        pairs = zip(one, other, strict=True)
        return [d for i, (x, y) in enumerate(pairs) for d in differences(x, y, f"{at}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [f"{at}: tensors differ"]
    both_nan = one != one and other != other
    return [] if one == other or both_nan else [f"{at}: {one!r} and {other!r}"]


def compare(folder: Path, whole: Path) -> list[str]:
    """Where the run in `folder` differs from that in `whole`: last checkpoint, log, rollouts."""
    one, other = (state(at / RUN / "checkpoints" / "last.ckpt") for at in (folder, whole))
    found = differences(one, other, "last.ckpt")
    readers: dict[str, Callable[[Path], Any]] = {
        "scalars": scalars,
        "tensors": tensors,
        "files": files,
    }
    for name, read in readers.items():
        found += differences(read(folder / RUN), read(whole / RUN), name)
    return found


def state(checkpoint: Path) -> dict[str, Any]:
    """Content of a checkpoint, a file or a folder of shards."""
    if checkpoint.is_file():
        return dict(torch.load(checkpoint, weights_only=True))
    with TemporaryDirectory() as scratch:
        file = Path(scratch, "whole.pt")
        dcp_to_torch_save(checkpoint, file)
        tensors = torch.load(file, weights_only=True)
    return {"tensors": tensors, **torch.load(checkpoint / META, weights_only=True)}


def files(run: Path) -> dict[str, str]:
    """The sampled rollouts that it wrote, as lines and as pages."""
    paths = [*run.glob("rollouts.jsonl*"), *run.glob("rollouts/*.html")]
    return {str(path.relative_to(run)): path.read_bytes().hex() for path in paths}
