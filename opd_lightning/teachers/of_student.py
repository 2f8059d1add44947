"""Teachers derived from the student: its running average, and its base without the adapter."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import Reader
from opd_lightning.models.compilation import compile_layers
from opd_lightning.models.head import TokenStates
from opd_lightning.models.lora import moves_base
from opd_lightning.models.sharding import copy_full, full_tensor
from opd_lightning.teachers.local import LocalTeacher, OwnModelTeacher
from opd_lightning.types import RolloutBatch

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class EMATeacher(OwnModelTeacher):
    """Exponential moving average of the student: `theta_T <- theta_T + rate (theta - theta_T)`.

    It starts with the student's initial weights. `callbacks.EMATeacherUpdate` updates it after
    optimiser steps and saves it in the checkpoint; without that callback a run is refused.

    Args:
        rate: Weight of the student in each update: SDFT's code 0.01, SDPO 0.05. 1 copies it, as
            CRISP (2603.05433) does every 50 steps; 0 never changes the teacher.
        every: Optimiser steps between updates.
        warmup: Number of initial updates whose n-th rate is at least 1 / (n + 1), so that the
            teacher is the mean of its students and the initial weights are soon forgotten.
    """

    def __init__(self, rate: float = 0.01, every: int = 1, warmup: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise UserError(f"EMATeacher.rate: got {rate}, expected a number in [0, 1]")
        if every < 1:
            raise UserError(f"EMATeacher.every: got {every} steps, expected at least 1")
        if warmup < 0:
            raise UserError(f"EMATeacher.warmup: got {warmup} updates, expected at least 0")
        if warmup and not rate:
            raise UserError(
                f"EMATeacher.warmup: got {warmup} updates for rate 0, at which it never moves; "
                "leave it out"
            )
        self.rate = rate
        self.every = every
        self.warmup = warmup

    def load(self, device: torch.device, student: Student) -> None:
        if self._reader is not None:
            return
        sharding = self._sharding = student.sharding
        model = deepcopy(student.model) if sharding is None else student.build(empty=True)
        if student.is_compiled and sharding is None:  # copies are not
            compile_layers(model.get_base_model() if student.lora is not None else model)
        self._reader = Reader(model).eval().requires_grad_(False)
        if sharding is None:
            self._reader.to(device)
        else:
            sharding.copy(self._reader, student)

    def describe(self, student: Student) -> None:
        self._reader = Reader(student.build(empty=True, stored=False))

    @torch.no_grad()
    def follow(self, student: Student, step: int) -> None:
        """Update towards the student after optimiser step number `step`, counted from 1.

        Elementwise over the trainable parameters, so it applies to LoRA adapters and shards.
        """
        update, remainder = divmod(step, self.every)
        if remainder == 0:
            rate = max(self.rate, 1 / (update + 1)) if update <= self.warmup else self.rate
            own = dict(self.model().named_parameters())
            for name, parameter in student.model.named_parameters():
                if parameter.requires_grad:
                    own[name].lerp_(parameter.to(own[name].dtype), rate)

    def state_dict(self, student: Student) -> dict[str, Tensor]:
        """Return the averaged parameters, unsharded and on the CPU.

        If the student is sharded, all ranks must call it and only rank 0 gets the parameters.
        """
        own = dict(self.model().named_parameters())
        state = {}
        for name, parameter in student.model.named_parameters():
            if parameter.requires_grad:
                value = full_tensor(own[name])
                if self._sharding is None or self._sharding.reads:
                    state[name] = value.cpu()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load unsharded parameters; every rank passes all of them."""
        own = dict(self.model().named_parameters())
        for name, value in state.items():
            copy_full(own[name], value)


class AdapterOffTeacher(LocalTeacher):
    """The student without its LoRA adapter: its initial weights without a second model.

    Settings under which these differ are refused: initialisations that change the base or the model
    (PiSSA, OLoRA, `init_lora_weights: false`), and a `bias` that trains the base's own.
    """

    _student: Student

    def check_model(self, student: Student) -> None:
        if student.lora is None:
            raise UserError(
                "AdapterOffTeacher: the student has no LoRA adapter to switch off; set "
                "student.lora, or use FrozenTeacher with the student's path"
            )
        if setting := moves_base(student.lora):
            raise UserError(
                f"AdapterOffTeacher: got student.lora.{setting}, with which the student without "
                "its adapter is not its initial model; use FrozenTeacher with the student's path, "
                "or leave the setting out"
            )

    def load(self, device: torch.device, student: Student) -> None:
        self.check_model(student)
        self._student = student

    @property
    def is_collective(self) -> bool:
        return self._student.sharding is not None

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype in which the student's layers are gathered; None if it is not sharded."""
        return None if self._student.sharding is None else self._student.sharding.compute_dtype

    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        states = super().states(batch, view)
        # The head is read later, when the adapter is enabled again: read its base layer.
        project: Any = states.head.project
        for beneath in ("base_layer", "original_module"):  # wrappers of LoRA and modules_to_save
            project = getattr(project, beneath, project)
        return TokenStates(states.hidden, replace(states.head, project=project))

    def _read(self, batch: RolloutBatch, view: str) -> TokenStates:
        learning = [p for p in self._student.parameters() if p.requires_grad]
        with self._student.model.disable_adapter():
            # peft freezes disabled adapters, and FSDP would transfer that to gathered weights
            # before or after the switch; gradients are disabled here anyway.
            for parameter in learning:
                parameter.requires_grad_(True)
            return self._student.states(batch, view)
