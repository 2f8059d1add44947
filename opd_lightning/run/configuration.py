"""Checks of configuration and models that need no weights; all raise UserError."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy

from opd_lightning.data.views import LATE, RESPONSES
from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.models.tokenization import check_spelling
from opd_lightning.run.model_checks import check_same_tokens, check_usable
from opd_lightning.run.part_checks import check_held_teachers
from opd_lightning.teachers.frozen import FrozenTeacher
from opd_lightning.teachers.of_student import EMATeacher
from opd_lightning.training.callback import run_callbacks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

# Lightning's callbacks that change the step or the trained weights, and replacements.
REFUSED_CALLBACKS = {
    WeightAveraging: (
        "it puts averaged weights into the student, which the engine does not have; use "
        "model.teacher EMATeacher with callbacks.EMATeacherUpdate for an averaged teacher"
    ),
    StochasticWeightAveraging: (
        "it averages weights over the last epochs, and runs are measured in steps; average "
        "exported students, or use callbacks.EMATeacherUpdate"
    ),
    GradientAccumulationScheduler: (
        "it changes the micro-batches of a step during the run, but the stream makes them in "
        "advance; set trainer.accumulate_grad_batches"
    ),
}

# These keep weights and batches in float32; others would also cast log-probs and rewards.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def check_models(module: DistillationModule) -> None:
    """Check that models can be read and that teachers use the student's token ids."""
    student = module.student.source
    for teacher in module.teachers():
        check_held_teachers(teacher)
    check_usable(student)
    for source in teacher_sources(module):
        check_usable(source)
        check_same_tokens(student, source)
    for source in teacher_sources(module, foreign=True):
        check_usable(source)
        check_spelling(student)
        check_spelling(source)
    for part in (part for teacher in module.compared_teachers() for part in teacher.parts()):
        source = part.source or student
        sizes = [s.config.get_text_config().vocab_size for s in (student, source)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"student {student.path!r} and teacher {source.path!r} have heads of "
                f"{sizes[0]} and {sizes[1]} tokens, which {type(module).__name__} cannot compare "
                "token by token; use a method, rules and terms of sampled tokens only"
            )
    module.student.check()
    for part in module.teacher_parts():
        part.check_model(module.student)


def check_method(module: DistillationModule, data: RolloutDataModule, trainer: Trainer) -> None:
    """Check that the data provide everything that the method reads."""
    name = type(module).__name__
    for view in sorted(module.views() - data.views.keys()):
        raise UserError(
            f"data.views: got {', '.join(sorted(data.views))}, but {name} reads the view {view!r}; "
            "add its template"
        )
    read = module.views() | ({data.mix.guided_view} if data.mix.guided else set())
    for view in sorted(data.user_views - read):
        raise UserError(
            f"data.views: got {view!r}, which {name} does not read; it reads "
            f"{', '.join(sorted(read)) or 'the student prompt alone'}"
        )
    early = {view for view, how in data.views.items() if not how.is_late}
    fits = early & module.views() or early
    if data.mix.guided and data.mix.guided_view not in fits:
        raise UserError(
            f"data.mix.guided_view: got {data.mix.guided_view!r}, expected "
            f"{' or '.join(sorted(fits))}: the sampler must be told what {name}'s teacher is told, "
            "and before there are responses"
        )
    _check_late_views(data, sorted(module.views()))
    parts = module.teacher_parts()
    offloaded = [part for part in parts if isinstance(part, FrozenTeacher) and part.offload]
    if offloaded and _shards(trainer):
        raise UserError(
            f"teacher.offload: got true for {offloaded[0].source.path!r}, but this run shards its "
            "models, which leaves each process a part; leave offload out"
        )
    lora = module.student.lora
    if lora is not None and lora.target_parameters and _shards(trainer):
        raise UserError(
            f"student.lora.target_parameters: got {sorted(lora.target_parameters)}, but this run "
            "shards its models, whose experts are not adapted in parts; use DDP, or target_modules"
        )
    coarse = module.student.lora is None and module.student.dtype != "float32"
    moving = [part for part in parts if isinstance(part, EMATeacher) and part.rate > 0]
    if moving and not any(callback.moves_ema_teachers for callback in run_callbacks(trainer)):
        raise UserError(
            f"trainer.callbacks: nothing updates {name}'s EMATeacher (rate {moving[0].rate}); add "
            "callbacks.EMATeacherUpdate, or use a FrozenTeacher"
        )
    if coarse and any(part.rate < 1 for part in moving):
        raise UserError(
            f"student.dtype: got {module.student.dtype!r}, in which small moves of an EMATeacher "
            "round to nothing; use float32 with trainer.precision bf16-mixed"
        )
    if module.needs_groups and not data.mix.samples:
        raise UserError(
            f"data.mix: got given responses alone, but {name} or one of its rules compares the "
            "rewards of the student's responses to a prompt with one another; leave the rule out, "
            "or let data.mix.recorded and data.mix.teacher add up to less than 1"
        )
    if module.needs_groups and data.samples_per_prompt < 2:
        raise UserError(
            f"data.samples_per_prompt: got {data.samples_per_prompt}, but {name} compares the "
            "rewards of a prompt's responses with one another; expected at least 2"
        )
    reader = name if module.needs_rewards else "data.mix.only_correct"
    if (module.needs_rewards or data.mix.only_correct) and data.verifier is None:
        raise UserError(f"data.verifier: got nothing, but {reader} reads rewards; name a verifier")
    if data.mix.teacher and data.teacher is None:
        raise UserError(
            f"data.teacher: got nothing for mix.teacher {data.mix.teacher}; name its path and "
            "engine"
        )
    if data.teacher is not None:
        check_usable(data.teacher.source)
        check_same_tokens(module.student.source, data.teacher.source, writes=True)
    foreign = data.mix.teacher or data.mix.reads_records
    if module.needs_demonstrations and data.mix.samples:
        raise UserError(
            f"data.mix: got the student's own responses, but {name} learns from given ones alone; "
            "let data.mix.recorded and data.mix.teacher add up to 1"
        )
    _check_prepared(module, data)
    check_truncation(module, data)
    for share, count in zip(
        ("teacher", "recorded"), data.mix.counts(data.prompts_per_step), strict=True
    ):
        given = getattr(data.mix, share)
        if given and not count and not data.mix.whole_steps:
            raise UserError(
                f"data.mix.{share}: got {given}, which is less than half a prompt of "
                f"data.prompts_per_step {data.prompts_per_step}; raise one of them"
            )
    if foreign and not module.takes_demonstrations:
        raise UserError(
            f"data.mix: got responses that the student did not write, which {name} takes for its "
            "own; set model.init_args.imitation to their weight, or take them out of the mix"
        )


def _shards(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_truncation(module: DistillationModule, data: RolloutDataModule) -> None:
    """Check that a truncated sampler is not read as the policy, unless its bias is accepted."""
    name = type(module).__name__
    biased = data.mix.samples and data.sampling.is_truncated and module.averages_samples
    if biased and not data.accept_truncation_bias:
        raise UserError(
            f"data.sampling: got top_p {data.sampling.top_p:g}, top_k {data.sampling.top_k}, but "
            f"the loss of {name} with its rules and terms is a mean over sampled tokens, biased "
            "where some are never drawn; expected top_p 1, top_k 0, a divergence, or "
            "data.accept_truncation_bias true"
        )
    if data.accept_truncation_bias and not biased:
        raise UserError(
            f"data.accept_truncation_bias: got true, but sampling biases no gradient of {name} "
            "here; leave it out"
        )


def _check_prepared(module: DistillationModule, data: RolloutDataModule) -> None:
    """Check that teachers with precomputed scores are asked about recorded responses only."""
    for ask in module.all_asks().values():
        for part in ask.teacher.parts():
            kind = type(part).__name__
            if part.answers_live:
                continue
            if data.mix.samples or data.mix.teacher:
                raise UserError(
                    f"data.mix: got responses that are yet to be sampled, which a {kind} cannot "
                    "have scored; set data.mix.recorded to 1, or name the teacher itself"
                )
            if ask.view != "student" and data.views[ask.view].is_late:
                raise UserError(
                    f"data.views: {ask.view!r} depends on how responses are verified, which a "
                    f"{kind} cannot know in advance; name the teacher itself"
                )


def _check_late_views(data: RolloutDataModule, names: Sequence[str]) -> None:
    """Check that what the templates of late views read can be known of some response."""
    for name in names:
        read = data.views[name].variables & LATE - {"attempt"}
        if read and data.verifier is None:
            raise UserError(
                f"data.verifier: got nothing, but the view {name!r} reads {min(read)!r}, which "
                "comes from one; name a verifier, or change the template"
            )
        if read and read <= RESPONSES and not data.mix.samples:
            raise UserError(
                f"data.mix: got given responses alone, but the view {name!r} reads {min(read)!r}, "
                "another response of the student's to the prompt; change the template, or let "
                "data.mix.recorded and data.mix.teacher add up to less than 1"
            )
        if read and read <= RESPONSES and data.samples_per_prompt < 2:
            raise UserError(
                f"data.samples_per_prompt: got {data.samples_per_prompt}, but the view {name!r} "
                f"reads {min(read)!r}, another response to the prompt; expected at least 2"
            )


def check_step_size(trainer: Trainer, data: RolloutDataModule) -> None:
    """Check that a step divides into ranks and micro-batches."""
    world, parts = trainer.world_size, trainer.accumulate_grad_batches
    if parts > 1 and data.max_tokens_per_micro_batch is not None:
        raise UserError(
            f"trainer.accumulate_grad_batches: got {parts} and data.max_tokens_per_micro_batch "
            f"{data.max_tokens_per_micro_batch}, which decides the number of micro-batches; leave "
            "one of them out"
        )
    if data.prompts_per_step % world:
        raise UserError(
            f"data.prompts_per_step: got {data.prompts_per_step} for {world} processes, "
            "expected a multiple of their number"
        )
    share = data.prompts_per_step // world
    # Worst case: one rank has all prompts that the student does not answer, one response each.
    others = share if data.mix.whole_steps else min(share, sum(data.mix.counts(share * world)))
    rollouts = (share - others) * data.samples_per_prompt + others
    if rollouts < parts:
        raise UserError(
            f"trainer.accumulate_grad_batches: got {parts} for {rollouts} rollouts a step per "
            "process, expected at most one micro-batch per rollout; lower it or raise "
            "data.prompts_per_step"
        )


def teacher_sources(module: DistillationModule, *, foreign: bool = False) -> list[ModelSource]:
    """Return sources of teachers with the student's tokenizer or, if `foreign`, with another."""
    parts = [part for part in module.teacher_parts() if part.has_own_tokenizer is foreign]
    return [part.source for part in parts if part.source is not None]


def context_of(module: DistillationModule) -> int:
    """Return the largest number of tokens that every model that reads a view can read."""
    student = module.student.source
    asks = [ask for ask in module.all_asks().values() if ask.view != "student"]
    parts = [part for ask in asks for part in ask.teacher.parts()]
    sources = [part.source or student for part in parts if not part.has_own_tokenizer]
    return min((source.context_length for source in sources), default=student.context_length)


def check_trainer(trainer: Trainer) -> None:
    """Check settings of Lightning's Trainer that would break the loss or the checkpoints."""
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision: got {trainer.precision!r}, expected one of "
            f"{', '.join(PRECISIONS)}; for weights in bfloat16 set student.dtype"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: got {type(callback).__name__}: {reason}")
    parts = trainer.accumulate_grad_batches
    every = getattr(trainer, "val_check_interval", None)  # Lightning does not set it for a time
    if every is None and (parts > 1 or trainer.world_size > 1):
        raise UserError(
            f"trainer.val_check_interval: got a time with accumulate_grad_batches {parts} on "
            f"{trainer.world_size} processes, expected a number of micro-batches; processes "
            "cannot agree on a time, and it may pass inside a step"
        )
    if isinstance(every, int) and every % parts:
        raise UserError(
            f"trainer.val_check_interval: got {every} micro-batches for "
            f"accumulate_grad_batches {parts}, expected a multiple, so that validation and "
            "checkpoints fall between optimiser steps"
        )


def check_optimizer(module: DistillationModule) -> None:
    """Build optimiser and scheduler on a stand-in of the weights, so that mistakes show early."""
    # A matrix, as in LoRA; every optimiser accepts it.
    stand_in = [torch.nn.Parameter(torch.zeros(2, 2))]
    name = "optimizer"
    try:
        optimizer = module.optimizer(stand_in)
        for option, value in optimizer.defaults.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"model.optimizer.{option}: got {value}, expected a finite number")
        if module.lr_scheduler is None:
            return
        name = "lr_scheduler"
        scheduler = module.lr_scheduler(optimizer)
    except UserError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"model.{name}: {error}; correct its settings") from error
    except RuntimeError:  # such as an optimiser for GPUs only; the stand-in is on the CPU
        return
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UserError(
            f"model.lr_scheduler: got {type(scheduler).__name__}, which waits for a metric, but "
            "schedulers are stepped after every optimiser step without one; use one that is a "
            "function of the step, such as torch.optim.lr_scheduler.CosineAnnealingLR"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # the optimiser was not stepped before it
            scheduler.step()
    except ArithmeticError as error:
        raise UserError(
            f"model.lr_scheduler: {type(scheduler).__name__} has no learning rate after step 1 "
            f"({error}); correct its settings"
        ) from error
