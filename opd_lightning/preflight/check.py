"""All checks of `opd check`, in order: first those that need no weights, then the numbers."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import empty_causal_lm
from opd_lightning.models.folder_format import stored_tensors
from opd_lightning.preflight import agreement, cost, teacher_scores, weight_push
from opd_lightning.preflight.finding import Finding, attempt, gather
from opd_lightning.preflight.probe import Probe
from opd_lightning.preflight.rewards import check_rewards
from opd_lightning.preflight.settings import check_settings
from opd_lightning.preflight.tokens import check_tokens
from opd_lightning.preflight.widths import Widths
from opd_lightning.run.method_checks import check_method
from opd_lightning.run.model_checks import check_models
from opd_lightning.run.trainer_checks import check_step_size, check_trainer

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule


def run_checks(
    trainer: Trainer,
    module: DistillationModule,
    data: RolloutDataModule,
    *,
    samples: int,
    compare_teachers: bool,
) -> list[Finding]:
    """Run all checks and return their findings. Weights load only if there are no errors.

    Args:
        trainer: Connected to `module` and `data`.
        module: The method.
        data: The method's data.
        samples: Responses per kind of author that the numbers are computed from.
        compare_teachers: Load the weights of remote teachers, and compare.
    """
    errors = _configuration(trainer, module, data)
    if errors:
        readable = all(error.subject != "models" for error in errors)
        later = Finding("info", "numbers", "not looked at: correct the errors and check again")
        tokens = gather("tokens", check_tokens(module, data)) if readable else []
        return [*errors, *tokens, later]
    findings = [Finding("ok", "configuration", "all that `opd fit` checks before weights load")]
    probe = Probe(module, data, data.train_dataloader(), samples, program=resident_bytes())
    findings += gather("tokens", check_tokens(module, data, probe.stream.prompts))
    findings += check_settings(module, data, probe.stream)
    unloaded = attempt("weights", lambda: _load(trainer, module))
    return findings + (unloaded or gather("numbers", _numbers(probe, compare_teachers)))


def resident_bytes() -> int:
    """Return the largest size in memory that this process has had."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _configuration(
    trainer: Trainer, module: DistillationModule, data: RolloutDataModule
) -> list[Finding]:
    """Run the checks of `opd fit` that need no weights; independent ones run despite errors."""
    parts = attempt("method", module.check)
    models = attempt("models", lambda: check_models(module))
    errors = [*parts, *models, *attempt("trainer", lambda: check_trainer(trainer))]
    if not parts and not models:
        errors += attempt("data", lambda: check_method(module, data, trainer))
    errors += attempt("step", lambda: check_step_size(trainer, data))
    return errors or attempt("set-up", lambda: _set_up(trainer, module, data))


def _set_up(trainer: Trainer, module: DistillationModule, data: RolloutDataModule) -> None:
    """Run the set-up of `opd fit` with all its checks.

    Skips Lightning's callbacks and writes nothing.
    """
    data.setup("fit")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        ours = not type(callback).__module__.startswith("lightning.")
        if ours and not isinstance(callback, SaveConfigCallback):
            callback.setup(trainer, module, "fit")


def _load(trainer: Trainer, module: DistillationModule) -> None:
    """Load student and teachers in one process, unsharded."""
    module.student.load()
    module.to(trainer.strategy.root_device)
    for teacher in module.teachers():
        teacher.load(module.device, module.student)


def _numbers(probe: Probe, compare_teachers: bool) -> Iterator[Finding]:
    """Yield findings one by one, so that those before an exception are kept."""
    unbuilt = attempt("optimiser", probe.module.configure_optimizers)
    yield from unbuilt
    if probe.engine is not None and (broken := attempt("weight push", lambda: probe.own)):
        yield from broken
        return
    own = probe.own if probe.engine is not None else []
    # The models also score responses that the verifier drops.
    trained = [replace(rollout, dropped=False) for rollout in probe.trained]
    yield from check_rewards(probe)
    yield agreement.check_alignment(probe, trained)
    if own:
        yield agreement.check_engine(probe)
        yield agreement.check_seeds(probe)
    yield agreement.check_self_distillation(probe, trained)
    yield from teacher_scores.check_teachers(probe, trained, compare=compare_teachers)
    if own:
        yield from gather("weight push", weight_push.check_push(probe))
    tokens = cost.step_tokens(probe)
    yield cost.tokens(probe, tokens)
    if not unbuilt:
        yield from _cost(probe)
    yield cost.time(probe, tokens)


def _cost(probe: Probe) -> Iterator[Finding]:
    """Estimate memory and traffic; unknown sizes of an architecture are no error."""
    source, device = probe.module.student.source, probe.module.device
    on_gpu = device.type == "cuda"
    available = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    try:
        lm = empty_causal_lm(source, dtype="float32")
        weights = sum(tensor.numel() for _, tensor in stored_tensors(lm))
        widths = Widths.of(source.config)
        plan = cost.plan(
            probe.module,
            probe.data,
            probe.shape,
            micro_batches=probe.micro_batches,
            engine=cost.engine_bytes(probe.engine, widths, weights, probe.shape, available),
            demonstrator=cost.demonstrator_bytes(probe.data, probe.shape, available),
            on_gpu=on_gpu,
        )
        program = probe.program if available is None else 0
        yield cost.memory(plan, available, cost.smaller_batches(probe.shape), program=program)
        yield cost.traffic(plan, weights)
    except UserError as error:
        yield Finding("info", "memory (estimate)", str(error))
