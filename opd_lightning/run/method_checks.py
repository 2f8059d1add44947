"""Checks that data, teachers and callbacks provide what the method reads, before weights load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import ModelParallelStrategy

from opd_lightning.data.views import LATE, RESPONSES
from opd_lightning.errors import UserError
from opd_lightning.run.model_checks import check_same_tokens, check_usable
from opd_lightning.teachers.frozen import FrozenTeacher
from opd_lightning.teachers.of_student import EMATeacher
from opd_lightning.training.callback import run_callbacks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule


def check_method(module: DistillationModule, data: RolloutDataModule, trainer: Trainer) -> None:
    """Check that the run provides everything that the method reads.

    Raises:
        UserError: Something is missing, or nothing reads it.
    """
    _check_views(module, data)
    _check_weights(module, trainer)
    _check_rewards(module, data)
    _check_authors(module, data)
    _check_prepared(module, data)
    check_truncation(module, data)
    _check_shares(module, data)


def _check_views(module: DistillationModule, data: RolloutDataModule) -> None:
    """Check that the views of teachers and of guided responses are there, and are read."""
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


def _check_weights(module: DistillationModule, trainer: Trainer) -> None:
    """Check that weights can be sharded, offloaded and averaged as they are configured to be."""
    name, shards = type(module).__name__, isinstance(trainer.strategy, ModelParallelStrategy)
    parts = module.teacher_parts()
    offloaded = [part for part in parts if isinstance(part, FrozenTeacher) and part.offload]
    if offloaded and shards:
        raise UserError(
            f"teacher.offload: got true for {offloaded[0].source.path!r}, but this run shards its "
            "models, which leaves each process a part; leave offload out"
        )
    lora = module.student.lora
    if lora is not None and lora.target_parameters and shards:
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


def _check_rewards(module: DistillationModule, data: RolloutDataModule) -> None:
    """Check that responses get the rewards, and prompts the responses, that are compared."""
    name = type(module).__name__
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


def _check_authors(module: DistillationModule, data: RolloutDataModule) -> None:
    """Check that every author of the mix can write responses, and that the method reads them."""
    if data.mix.teacher and data.teacher is None:
        raise UserError(
            f"data.teacher: got nothing for mix.teacher {data.mix.teacher}; name its path and "
            "engine"
        )
    if data.teacher is not None:
        check_usable(data.teacher.source)
        check_same_tokens(module.student.source, data.teacher.source, writes=True)
    if module.needs_demonstrations and data.mix.samples:
        raise UserError(
            f"data.mix: got the student's own responses, but {type(module).__name__} learns from "
            "given ones alone; let data.mix.recorded and data.mix.teacher add up to 1"
        )


def _check_shares(module: DistillationModule, data: RolloutDataModule) -> None:
    """Check that a step has prompts for every share of given responses, which are imitated."""
    for share, count in zip(
        ("teacher", "recorded"), data.mix.counts(data.prompts_per_step), strict=True
    ):
        given = getattr(data.mix, share)
        if given and not count and not data.mix.whole_steps:
            raise UserError(
                f"data.mix.{share}: got {given}, which is less than half a prompt of "
                f"data.prompts_per_step {data.prompts_per_step}; raise one of them"
            )
    if (data.mix.teacher or data.mix.reads_records) and not module.takes_demonstrations:
        raise UserError(
            "data.mix: got responses that the student did not write, which "
            f"{type(module).__name__} takes for its own; set model.init_args.imitation to their "
            "weight, or take them out of the mix"
        )


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
