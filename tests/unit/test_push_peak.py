"""Memory of a push beside the model: one full tensor, two while LoRA is merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_lightning.data.engines import push
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine


class Peak(TorchDispatchMode):
    """Dispatch mode that measures the peak of allocated bytes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result


@pytest.mark.parametrize(("lora", "full_tensors"), [(False, 1), (True, 2)])
def test_full_tensors_come_and_go_one_at_a_time(
    lora: bool, full_tensors: int, tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every matrix of this model's MLPs, three in a row, is its largest.
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    student = Student(str(tiny_model_dir()), lora=config if lora else None)
    student.load()
    # A gathered shard is a new tensor.
    monkeypatch.setattr("opd_lightning.models.weights.full_tensor", lambda tensor: tensor.clone())
    engine = HFEngine()
    engine.start(student.source, max_length=8)
    largest = max(p.nbytes for p in student.parameters())
    student.requires_grad_(False)
    assert engine._model is not None
    models = torch.nn.ModuleList([student, engine._model])
    with Peak(models) as peak:
        assert push(student, engine, version=1) == 1
    assert full_tensors * largest <= peak.bytes < (full_tensors + 0.2) * largest
