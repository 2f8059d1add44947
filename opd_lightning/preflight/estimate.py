"""Memory, tokens and hours of a run, from the config.json of its models.

Models are built on the meta device: there are neither weights nor prompts, and no GPU is needed.

    memory     of `preflight.memory`: exact for weights, gradients and optimiser states, and
               estimates of activations and of the head at its bound
    student    forward, backward (2 forwards; 1 where weights are frozen under LoRA) and the
               recomputed forward of checkpointed layers, and of the head always; one more forward
               of all micro-batches but the first where a step is scored before it trains
    teachers   a forward for every view that one reads; with one per domain, equal shares
    writing    `preflight.speeds.Decoder`: decoding reads weights and KV cache
    step       writing + teachers + student, or the longer of writing and the rest where rollouts
               are one step old

Operations are those of `preflight.operations`, divided by assumed speeds. Not counted: traffic
between processes, pushes, verifiers, validation and checkpoints, teachers on servers, and what a
view adds to a prompt. Responses of demonstrators are as long as the student's on average, and
recorded ones at most as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import empty_causal_lm
from opd_lightning.preflight import cost
from opd_lightning.preflight.finding import Finding, attempt, gather
from opd_lightning.preflight.operations import forward_operations, matrix_weights
from opd_lightning.preflight.plan import Plan
from opd_lightning.preflight.speeds import Decoder, Gpu
from opd_lightning.preflight.step_shape import StepShape
from opd_lightning.preflight.widths import Widths
from opd_lightning.rollouts import HFEngine, VLLMEngine, VLLMServerEngine
from opd_lightning.rollouts.base import Engine
from opd_lightning.run.method_checks import check_truncation
from opd_lightning.run.trainer_checks import check_step_size, check_trainer
from opd_lightning.teachers import AdapterOffTeacher, CrossTokenizerTeacher
from opd_lightning.teachers.base import Teacher
from opd_lightning.teachers.local import OwnModelTeacher

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

SERVED = 0.9  # share of a server's GPU that its engine uses
USUAL_PROMPT, USUAL_LONGEST_PROMPT = 512, 2048  # tokens that are assumed where they fit


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Assumed lengths in tokens.

    Args:
        prompt: Mean prompt length; None is 512, or fewer where no more fit.
        longest_prompt: Length of the longest prompt; None is 2048, or fewer where no more fit.
        response: Mean response length; None assumes the maximum.
    """

    prompt: int | None
    longest_prompt: int | None
    response: int | None

    def __post_init__(self) -> None:
        for option, value, least in (
            ("prompt_tokens", self.prompt, 1),
            ("longest_prompt", self.longest_prompt, self.prompt or 1),
            ("response_tokens", self.response, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"--{option}: got {value}, expected at least {least}")

    def prompts(self, room: int) -> tuple[int, int]:
        """Return the mean and the longest prompt; what is not given has `room` tokens at most."""
        longest = self.longest_prompt or max(self.prompt or 1, min(USUAL_LONGEST_PROMPT, room))
        return self.prompt or min(USUAL_PROMPT, longest), longest


@dataclass(frozen=True)
class _Model:
    """A model in a process, without weights."""

    model: nn.Module
    config: Any

    @property
    def widths(self) -> Widths:
        return Widths.of(self.config)

    @property
    def weights(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def decoder(self) -> Decoder:
        return Decoder(weights=2 * self.weights, cached=2 * self.widths.cache)

    def operations(self, rows: float, length: float, read: float) -> tuple[float, float]:
        """Return the operations of a forward pass in layers and head, each over all rows."""
        matrices = matrix_weights(self.model, self.config)
        layers = forward_operations(self.widths, [length], 0, matrices)
        head = forward_operations(self.widths, [], read, matrices)
        return rows * layers, rows * head


def estimate(
    trainer: Trainer,
    module: DistillationModule,
    data: RolloutDataModule,
    lengths: Lengths,
    gpu: Gpu,
) -> list[Finding]:
    """Return estimates of a run, or what is wrong with its configuration.

    Args:
        trainer: Connected to `module` and `data`; its processes need not exist.
        module: The method; nothing is loaded.
        data: Its data; no file is read.
        lengths: Tokens that are assumed.
        gpu: Speeds and memory that are assumed.
    """
    errors = [
        *attempt("method", module.check),
        *attempt("trainer", lambda: check_trainer(trainer)),
        *attempt("data", lambda: check_truncation(module, data)),
        *attempt("step", lambda: check_step_size(trainer, data)),
        *attempt("models", lambda: _describe(module)),
    ]
    return errors or gather("estimate", _findings(trainer, module, data, lengths, gpu))


def _describe(module: DistillationModule) -> None:
    """Build student and teachers on the meta device."""
    module.student.describe()
    for teacher in cost.own_models(module):
        teacher.describe(module.student)


def _findings(
    trainer: Trainer,
    module: DistillationModule,
    data: RolloutDataModule,
    lengths: Lengths,
    gpu: Gpu,
) -> Iterator[Finding]:
    world = trainer.num_devices * trainer.num_nodes
    prompt, longest_prompt = lengths.prompts(_room(module, data))
    shape = StepShape.of(data, world, longest_prompt)
    own = data.mix.samples or data.mix.reads_records
    longest = data.sampling.max_new_tokens if own else shape.response
    response = min(lengths.response or longest, longest)
    student = _Model(module.student, module.student.source.config)
    engine = cost.engine_bytes(data.engine, student.widths, student.weights, shape, gpu.memory)
    micro_batches = shape.micro_batches(prompt + response)
    written = _written(data)
    plan = cost.plan(
        module,
        data,
        shape,
        micro_batches=micro_batches,
        engine=engine,
        demonstrator=cost.demonstrator_bytes(data, shape, gpu.memory, stored=False),
        on_gpu=True,
    )
    yield _models(module, data)
    yield _tokens(written, prompt, response, micro_batches, longest)
    yield cost.memory(plan, gpu.memory, cost.smaller_batches(shape))
    yield cost.traffic(plan, student.weights)
    run = _TimeInputs(trainer, module, data, plan, shape, written, prompt, response, gpu)
    yield run.time()


def _room(module: DistillationModule, data: RolloutDataModule) -> int:
    """Return the tokens that the student's context leaves for a prompt."""
    context, most = module.student.source.context_length, data.sampling.max_new_tokens
    if most >= context and data.mix.samples:
        raise UserError(
            f"data.sampling.max_new_tokens: got {most}, but the student's context of {context} has "
            "to hold a prompt as well; lower it"
        )
    return max(1, context - most)


def _written(data: RolloutDataModule) -> Mapping[str, float]:
    """Return the rollouts of a step by author, over all processes."""
    mix, prompts = data.mix, data.prompts_per_step
    teacher, recorded = mix.counts(prompts)
    if mix.whole_steps:
        recorded = round(mix.recorded * prompts)  # on average
    samples = data.teacher.samples if data.teacher is not None else 1
    return {
        "student": (prompts - teacher - recorded) * data.samples_per_prompt,
        "teacher": teacher * samples,
        "recorded": prompts if mix.add_recorded else recorded,
    }


def _models(module: DistillationModule, data: RolloutDataModule) -> Finding:
    student = _Model(module.student, module.student.source.config)
    described = {f"student {module.student.source.path}": student.weights}
    for teacher in cost.own_models(module):
        name = teacher.source.path if teacher.source is not None else "the student's"
        weights = sum(p.numel() for p in teacher.model().parameters())
        described[f"{type(teacher).__name__} {name}"] = weights
    found = ", ".join(f"{name} {number / 1e9:.2f} B weights" for name, number in described.items())
    return Finding("ok", "models", found, values=dict(described))


def _tokens(
    written: Mapping[str, float], prompt: int, response: int, parts: int, longest: int
) -> Finding:
    rollouts = sum(written.values())
    counts = {
        "rollouts": rollouts,
        "prompt_tokens": rollouts * prompt,
        "response_tokens": rollouts * response,
        "micro_batches": float(parts),
    }
    bound = ", as many as allowed" if response == longest else f" of at most {longest:,}"
    return Finding(
        "ok",
        "tokens (assumed)",
        f"{rollouts:,.0f} rollouts a step of {prompt:,} + {response:,} tokens{bound}: "
        f"{counts['prompt_tokens'] + counts['response_tokens']:,.0f} tokens, "
        f"{counts['response_tokens']:,.0f} of them of responses; {parts} micro-batches a process",
        values=counts,
    )


@dataclass(frozen=True)
class _TimeInputs:
    """Inputs of the time estimate of a step."""

    trainer: Trainer
    module: DistillationModule
    data: RolloutDataModule
    plan: Plan
    shape: StepShape
    written: Mapping[str, float]
    prompt: int
    response: int
    gpu: Gpu

    @property
    def world(self) -> int:
        return self.plan.layout.world

    @property
    def student(self) -> _Model:
        return _Model(self.module.student, self.plan.config)

    def time(self) -> Finding:
        """Report the seconds of a step, and the hours of the run."""
        parts = {
            "write": self._write(),
            "student": self._student() / (self.gpu.peak * self.gpu.training),
            "teachers": self._teachers() / (self.gpu.peak * self.gpu.scoring),
        }
        trains = parts["student"] + parts["teachers"]
        stale = self.data.max_staleness > 0
        step = max(parts["write"], trains) if stale else parts["write"] + trains
        values = {f"{name}_seconds": seconds for name, seconds in parts.items()}
        values |= {"step_seconds": step, "step_operations": self.world * self._student()}
        found = f"about {cost.in_seconds(step)} a step: " + ", ".join(
            f"{name} {cost.in_seconds(seconds)}" for name, seconds in parts.items() if seconds
        )
        if (steps := self.trainer.max_steps) > 0:
            values["hours"] = steps * step / 3600
            values["gpu_hours"] = values["hours"] * self.world
            found += (
                f"; {steps:,} steps: {values['hours']:.1f} hours, "
                f"{values['gpu_hours']:,.0f} GPU hours"
            )
        return Finding("ok", "time (assumed speeds)", found, values=values)

    def _ahead(self) -> float:
        """Share of a step that is scored once more before it trains."""
        parts = self.plan.micro_batches
        return 1 - 1 / parts if self.module.scores_ahead(0, parts) else 0.0

    def _rows(self) -> float:
        return sum(self.written.values()) / self.world

    def _student(self) -> float:
        """Return the operations of the student's passes in a process."""
        length = self.prompt + self.response
        layers, head = self.student.operations(self._rows(), length, self.response)
        backward = 1 if self.module.student.lora is not None else 2
        passes = 1 + self._ahead() + backward
        return layers * (passes + self.plan.checkpointing) + head * (passes + 1)

    def _teachers(self) -> float:
        """Return the operations of all teachers' passes in a process."""
        compared = self.module.compared_teachers()
        total = 0.0
        for ask in dict.fromkeys(self.module.all_asks().values()):
            passes = 1 + (self._ahead() if ask.teacher in compared else 0)
            parts = ask.teacher.parts()
            for part in parts:
                if (model := self._model_of(part)) is not None:
                    length = self.prompt + self.response
                    rows = self._rows() / len(parts)
                    total += passes * sum(model.operations(rows, length, self.response))
        return total

    def _model_of(self, teacher: Teacher) -> _Model | None:
        """Return the model of a teacher in this process; None if it is elsewhere."""
        if isinstance(teacher, AdapterOffTeacher):
            return self.student
        inner = teacher.frozen if isinstance(teacher, CrossTokenizerTeacher) else teacher
        if not isinstance(inner, OwnModelTeacher):
            return None
        source = inner.source or self.module.student.source
        return _Model(inner.model(), source.config)

    def _write(self) -> float:
        """Return the seconds of writing: of the student's engine, then of the demonstrator's."""
        seconds = 0.0
        if self.data.engine is not None:
            written, most = self.written["student"], self.data.sampling.max_new_tokens
            seconds += self._write_with(self.data.engine, self.student, written, most)
        if (writer := self.data.teacher) is not None and self.written["teacher"]:
            model = empty_causal_lm(writer.source, dtype="bfloat16", stored=False)
            described = _Model(model, writer.source.config)
            most = writer.sampling_of(self.data.sampling).max_new_tokens
            seconds += self._write_with(writer.engine, described, self.written["teacher"], most)
        return seconds

    def _write_with(self, engine: Engine, model: _Model, responses: float, most: int) -> float:
        engines, memory, at_once = self.world, self.gpu.memory, float(self.shape.rows)
        decoder = model.decoder
        if isinstance(engine, VLLMServerEngine):
            engines, memory, at_once = len(engine.servers), SERVED * memory, 256.0
        elif isinstance(engine, VLLMEngine):
            decoder = replace(decoder, gpus=engine.tensor_parallel_size)
            memory *= engine.gpu_memory_utilization * decoder.gpus
            at_once = float(engine.max_num_seqs)
        elif isinstance(engine, HFEngine):
            at_once = float(engine.max_batch_size)
        return decoder.seconds(
            self.gpu,
            responses / engines,
            prompt=self.prompt,
            mean=min(self.response, most),
            most=most,
            memory=memory,
            at_once=at_once,
        )
