"""Callbacks that measure memory, collectives and pushes within a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd_lightning.data.engines import push
from opd_lightning.models.folder_format import FolderFormat
from opd_lightning.rollouts import HFEngine
from opd_lightning.rollouts.push_folder import PushFolder
from opd_lightning.serving.client import Servers

COLLECTIVES = {
    "all_reduce": ("c10d.allreduce_.", "_c10d_functional.all_reduce."),
    "all_gather": ("c10d._allgather_base_.", "_c10d_functional.all_gather_into_tensor."),
    "reduce_scatter": ("c10d._reduce_scatter_base_.",),
}
WAITS = 5  # measurements of each push


class Collectives(TorchDispatchMode):
    """Dispatch mode that counts bytes of whole tensors by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, begins in COLLECTIVES.items():
            if str(func).startswith(begins):
                self.sent[name] += max(_nbytes(x) for x in args[:2]) * (
                    args[1] if "functional.all_gather" in str(func) else 1
                )
        return func(*args, **(kwargs or {}))


class Record(Callback):
    """Records memory and sent bytes of this process, per step."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.held: dict[str, int] = {}
        self.growth: list[int] = []  # of the resident size, in bytes, per step
        self.sent: dict[str, int] = {}
        self.tokens: list[int] = []  # of responses, per micro-batch of this process
        self._begun = -1

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.tokens.append(int(batch.response_mask.sum()))
        if trainer.global_step > self._begun:
            self._begun = trainer.global_step
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self._resident = _status("VmRSS")
            self.collectives.sent.clear()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.growth.append(_status("VmHWM") - self._resident)
        self.sent = dict(self.collectives.sent)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        parameters = list(module.student.parameters())
        states = [s for p in trainer.optimizers[0].state.values() for s in p.values()]
        self.held = {
            "weights": _local(parameters),
            "gradients": _local([p.grad for p in parameters if p.grad is not None]),
            "optimizer": _local(states),
        }


class Pushes(Callback):
    """Times pushes of the student at the end of the run."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, list[tuple[float, float]]] = {}  # wall time and CPU time
        self._folder = folder

    def on_train_end(self, trainer: Any, module: Any) -> None:
        engine, student = HFEngine(), module.student
        engine.start(student.source, max_length=128)
        shared = PushFolder(self._folder)
        layout = FolderFormat.of(student.source, torch.float32)
        shared.start(Servers(["http://127.0.0.1:1"]), layout.tensors)

        def gather() -> None:
            for _ in student.weights():
                pass

        def to_folder() -> None:
            if trainer.is_global_zero:
                shared.write("0", student.weights())
            else:
                gather()

        for name, run in {
            "gather": gather,
            "in process, unproved": lambda: engine.load_weights(0, student.weights()),
            "in process": lambda: push(student, engine, version=0),
            "to a folder": to_folder,
        }.items():
            for _ in range(WAITS):
                trainer.strategy.barrier()
                began, worked = perf_counter(), process_time()
                run()
                passed = perf_counter() - began, process_time() - worked
                self.seconds.setdefault(name, []).append(passed)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


def _local(tensors: list[Any]) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def _status(name: str) -> int:
    """Return an entry of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024
