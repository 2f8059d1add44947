"""Ways to train in the untrained lab, small enough to be tried over several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig

from opd_lightning.data.mix import RolloutMix
from opd_lightning.losses.top_k import TopK
from opd_lightning.methods import EDGEOPD, GOPD, OPD, SGOPD, DistillationModule, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling, VLLMEngine
from opd_lightning.rollouts.base import Request
from opd_lightning.rules import PhasedFloor, StabilityWeight, TruncatedImportance
from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.teachers import (
    AdapterOffTeacher,
    ByDomainTeacher,
    EMATeacher,
    FrozenTeacher,
    Teacher,
)
from opd_lightning.types import Completion, StopReason

STUDENT, TEACHER = "lab/arithmetic/student", "lab/arithmetic/teacher"
SAMPLES = 2  # of a prompt
BUDGET = 32  # positions of a micro-batch: one of the longest rollouts


class FewWords(HFEngine):
    """Responses of no token at all, but for the first of rank 0's."""

    def __init__(self, spoken: int) -> None:
        super().__init__()
        self.spoken = spoken  # responses of a step that have tokens

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        spoken = 0 if dist.is_initialized() and dist.get_rank() else self.spoken
        completions = super().generate(requests, sampling)
        silence = [Completion([], [], StopReason.EOS)] * (len(completions) - spoken)
        return completions[:spoken] + silence


@dataclass(frozen=True)
class FirstPrompt(Rule):
    """Masks everything but the first prompt of a step, which is rank 0's."""

    prompts: int  # of a step

    def apply(
        self, signal: Signal, scored: Scored, observed: torch.Tensor | None = None
    ) -> tuple[Signal, Rates]:
        first = scored.batch.groups % self.prompts == 0
        kept = signal.mask & first[:, None]
        return Signal(advantage=signal.advantage, weight=signal.weight, mask=kept), {}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method, and what differs from the other ways in trainer and data."""

    method: Callable[[], DistillationModule]
    steps: int = 2
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    watched: bool = False  # measures now and then how far texts are from the start


class MovedStudent(Student):
    """A student whose adapters are away from zero, so that without them it is another model."""

    def build(self, *, empty: bool = False, stored: bool = True) -> Any:
        model = super().build(empty=empty, stored=stored)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        return model


def student(path: str = STUDENT, lora: Sequence[str] = (), **more: Any) -> Student:
    torch.manual_seed(0)  # of the adapters
    # Of one row, some processes hold none. The default alpha, 8, makes the loss so steep that what
    # is rounded grows tenfold in every step.
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        rank_pattern={"down_proj": 1},
        target_modules=list(lora),
        use_rslora=True,
    )
    return MovedStudent(path, lora=config if lora else None, **more)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def frozen() -> Teacher:
    return FrozenTeacher(TEACHER)


def sampled(*more: Rule, **shared: Any) -> DistillationModule:
    # What looks at the whole step must look at all of its ranks.
    rules = [StabilityWeight(tau=0.5), PhasedFloor(mixing=0.3, switch_step=1)]
    shared = {"aggregation": "mask-mean", "optimizer": sgd, **shared}
    return OPD(student(), frozen(), rules=[*rules, *more], **shared)


def divergence(**more: Any) -> DistillationModule:
    return DivergenceOPD(student(), frozen(), optimizer=sgd, **more)


def packed() -> DistillationModule:
    teacher = FrozenTeacher(TEACHER, packing="on")
    return DivergenceOPD(student(packing="on"), teacher, optimizer=sgd)


def compiled() -> DistillationModule:
    teacher = FrozenTeacher(TEACHER, compile=True)
    return DivergenceOPD(student(compile=True), teacher, optimizer=sgd)


def top_k() -> DistillationModule:
    return divergence(divergence=TopK(k=8, support="student", normalise="tail"))


def moving(optimizer: Any = sgd) -> DistillationModule:
    one = student(gradient_checkpointing=True)
    return GOPD(one, frozen(), EMATeacher(rate=0.5), scale=1.5, optimizer=optimizer)


def bare() -> DistillationModule:
    one = student("untied", lora=("q_proj", "lm_head"))
    return DivergenceOPD(one, AdapterOffTeacher(), optimizer=sgd)


def adapters() -> DistillationModule:
    one = student(lora=("q_proj", "down_proj"), gradient_checkpointing=True)
    return GOPD(one, frozen(), AdapterOffTeacher(), scale=1.5, optimizer=sgd)


def domains() -> DistillationModule:
    # The order of prompts gives some micro-batches one domain alone.
    teachers: dict[str, Teacher] = {"add-2": frozen(), "sub-2": FrozenTeacher(STUDENT)}
    return OPD(student(), ByDomainTeacher(teachers), optimizer=sgd)


def gated(*rules: Rule) -> DistillationModule:
    return SGOPD(
        student(),
        frozen(),
        FrozenTeacher(STUDENT),
        stability=0.5,
        rules=list(rules),
        optimizer=sgd,
    )


def evidence(*rules: Rule) -> DistillationModule:
    return EDGEOPD(
        student(),
        FrozenTeacher(STUDENT),
        clip=5.0,
        rules=list(rules),
        aggregation="mask-mean",
        optimizer=sgd,
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def few(method: Callable[[], DistillationModule], *, spoken: int = SAMPLES, **more: Any) -> Way:
    """Without a token on all ranks but the first."""
    return Way(method=method, data={"engine": FewWords(spoken), **more})


def masked(method: Callable[..., DistillationModule], prompts: int, **more: Any) -> Way:
    """With tokens everywhere, of which rules leave those of rank 0 at most."""
    return Way(method=lambda: method(FirstPrompt(prompts)), data=more)


MIXED: dict[str, Any] = {"mix": RolloutMix(teacher=0.5, only_correct=True)}
GUIDED: dict[str, Any] = {"mix": RolloutMix(guided=0.5)}


def ways(prompts: int) -> dict[str, dict[str, Way]]:
    """By part and name; `prompts` of a step."""
    return {
        "core": {
            "sampled": Way(
                method=sampled,
                steps=3,  # the third logs the validation after the second
                trainer={"gradient_clip_val": 0.05},
                watched=True,
            ),
            "few": few(sampled),
            # The teacher writes one response for a prompt: ranks have different numbers of them.
            "budget": Way(
                method=packed,
                data={"mix": RolloutMix(teacher=0.5), "max_tokens_per_micro_batch": BUDGET},
            ),
        },
        "start": {  # the student's first weights are a teacher, and move or not
            "moving": Way(method=moving),
            "adapters": Way(method=adapters, trainer={"gradient_clip_val": 0.05}),
        },
        "watched": {"adapters, watched": Way(method=adapters, steps=3, watched=True)},
        "more": {
            "ahead": Way(
                method=lambda: sampled(TruncatedImportance(unit_mean=True)),
                steps=3,  # the first that is trained on is not stale
                data={"max_staleness": 1},
            ),
            "divergence": Way(method=divergence),
            "bare": Way(method=bare),
            "domains": Way(method=domains),
            "top-k": Way(method=top_k),
            "dropped": Way(method=divergence, data=MIXED),
        },
        "compiled": {"compiled": Way(method=compiled)},
        "bfloat16": {
            "bfloat16": Way(method=divergence, trainer={"precision": "bf16-mixed"}),
            "bfloat16 adapters": Way(method=bare, trainer={"precision": "bf16-mixed"}),
        },
        "vllm": {
            "vllm": Way(method=adapters, data={"engine": VLLMEngine(max_num_seqs=16)}),
        },
        "empty": {
            "few, divergence": few(divergence),
            "few, top-k": few(top_k),
            "few, gated": few(gated, **MIXED),
            "few, evidence": few(evidence, **GUIDED),
            "none": few(sampled, spoken=0),
            "masked, sampled": masked(sampled, prompts),
            "masked, gated": masked(gated, prompts, **MIXED),
            "masked, evidence": masked(evidence, prompts, **GUIDED),
        },
    }
