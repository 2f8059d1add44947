"""LightningDataModule of all methods: prompts, engines, suites and streams of rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule

from opd_lightning.data.engines import Engines, push
from opd_lightning.data.mix import RolloutMix, TeacherSampler, samplings_by_author
from opd_lightning.data.prompt_files import PromptFiles
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.data.stream import TrainingStream
from opd_lightning.data.views import PromptView, Renderer
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import Bench, Loaded, Stream, Suite
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.evaluation.tasks import HarnessTask
from opd_lightning.evaluation.texts import LikelihoodSuite
from opd_lightning.processes import Ranks
from opd_lightning.rollouts.base import Engine, Sampling
from opd_lightning.rollouts.time_limit import TimeLimit
from opd_lightning.run.engines import check_engines, plan_engines
from opd_lightning.run.loading import load_training
from opd_lightning.run.method_checks import check_method
from opd_lightning.run.model_checks import check_models, context_of
from opd_lightning.run.monitors import check_monitors
from opd_lightning.run.part_checks import check_part_classes
from opd_lightning.run.partial_validation import check_limits
from opd_lightning.run.prompt_checks import PromptCheck
from opd_lightning.run.trainer_checks import check_optimizer, check_step_size, check_trainer
from opd_lightning.teachers.start import check_start
from opd_lightning.training.callback import run_callbacks
from opd_lightning.training.outputs import described
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    from opd_lightning.training.base import DistillationModule


class RolloutDataModule(LightningDataModule):
    """Provides rollouts of the student for training, and suites for evaluation.

    Args:
        train: Prompts to train on.
        engine: Engine that samples the student's responses.
        mix: Authors of the responses; by default the student writes all.
        teacher: Teacher that writes the demonstrations of `mix.teacher`.
        verifier: Scores responses in [0, 1]; None if the method needs no reward.
        views: Prompt templates for teachers, by name. The default of "privileged" is the row's
            privileged text as a system message.
        validation: Suites for `opd fit` and `opd validate`, by name.
        test: Suites for `opd test`, by name.
        texts: Suites of texts that are scored, for all three commands, by name.
        tasks: Tasks of lm-evaluation-harness, for all three commands, by name.
        suites: Suites of other classes, for all three commands, by name.
        sampling: Sampling of responses.
        accept_truncation_bias: Let top_p and top_k bias a policy gradient.
        prompts_per_step: Prompts per optimiser step, over all ranks.
        samples_per_prompt: Responses of the student per prompt.
        max_tokens_per_micro_batch: Most positions of a micro-batch, padding included, over all
            views. A step is then one batch of the Trainer (docs/scaling.md). None:
            `trainer.accumulate_grad_batches` micro-batches.
        max_staleness: 0 is strictly on-policy. 1 lets the engine generate a step's rollouts while
            the previous step trains, with weights that are one optimiser step old.
        engine_time_limit: Seconds after which a call of an engine ends the run; 0: no limit.
        template_args: Extra variables for the chat template.
        seed: Seed of prompt order, mix and sampling.
    """

    def __init__(
        self,
        train: PromptSource | None = None,
        engine: Engine | None = None,
        mix: RolloutMix = RolloutMix(),  # noqa: B008 - frozen, and shown by --help
        teacher: TeacherSampler | None = None,
        verifier: Verifier | None = None,
        views: dict[str, PromptView] | None = None,
        validation: dict[str, EvaluationSuite] | None = None,
        test: dict[str, EvaluationSuite] | None = None,
        texts: dict[str, LikelihoodSuite] | None = None,
        tasks: dict[str, HarnessTask] | None = None,
        suites: dict[str, Suite] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        accept_truncation_bias: bool = False,
        prompts_per_step: int = 64,
        samples_per_prompt: int = 1,
        max_tokens_per_micro_batch: int | None = None,
        max_staleness: Literal[0, 1] = 0,
        engine_time_limit: float = 3600.0,
        template_args: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train = train
        self.engine = engine
        self.mix = mix
        self.teacher = teacher
        self.verifier = verifier
        self.user_views = set(views or {})
        self.views = {"privileged": PromptView()} | (views or {})
        self.section_of: dict[str, str] = {}  # section of `data`, by suite
        self._stages: dict[str, dict[str, Suite]] = {
            "validate": dict(validation or {}),
            "test": dict(test or {}),
        }
        self._add_suites(texts=texts, tasks=tasks, suites=suites)
        self.sampling = sampling
        self.accept_truncation_bias = accept_truncation_bias
        self.prompts_per_step = prompts_per_step
        self.samples_per_prompt = samples_per_prompt
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.max_staleness = max_staleness
        self.template_args = template_args or {}
        self.seed = seed
        for name in ("prompts_per_step", "samples_per_prompt", "max_tokens_per_micro_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"data.{name}: got {value}, expected at least 1")
        self.prompt_files = PromptFiles()  # `Trainer.fit` sets those of the run
        limit = TimeLimit(engine_time_limit, self._where, "data.engine_time_limit")
        writer = teacher.engine if teacher else None
        self.engines = Engines(engine, writer, self._push_weights, limit)
        self._train: Loaded | None = None
        self.loaded: dict[str, Any] = {}  # result of `Suite.load`, by suite
        self._renderer: tuple[DistillationModule, Renderer] | None = None  # renderer of training

    @property
    def module(self) -> DistillationModule:
        """The method being trained or evaluated."""
        assert self.trainer is not None
        return self.trainer.lightning_module  # type: ignore[return-value]

    def setup(self, stage: str) -> None:
        """Read the data, and run all checks that need no weights."""
        assert self.trainer is not None
        self.sampling.check_temperature()
        self.module.check()
        check_part_classes(self.module, self, self.trainer)
        check_models(self.module)
        if self.compares_with_start(stage):
            check_start(self.module.student)
        suites = self.suites_of(stage)
        if stage != "fit" and not suites:
            name = "data.test" if stage == "test" else "data.validation"
            raise UserError(f"{name}: got no suites, so there is nothing to measure; name one")
        if stage == "fit" and self._train is None:
            check_trainer(self.trainer)
            check_monitors(self.trainer, suites)
            check_method(self.module, self, self.trainer)
            check_step_size(self.trainer, self)
            check_optimizer(self.module)
            self._train = load_training(self)
        bench = self.bench
        self.loaded |= {name: suite.load(name, bench) for name, suite in suites.items()}
        check_limits(self, stage)
        lengths = [suite.engine_length(self.loaded[name], bench) for name, suite in suites.items()]
        evaluated = [length for length in lengths if length is not None]
        check_engines(self, stage, evaluated=bool(evaluated))
        plan_engines(self, self._train, evaluated)

    def train_dataloader(self) -> TrainingStream:
        assert self._train is not None
        assert self.train is not None
        return TrainingStream(
            *self._train,
            order=self.train.order(self._train.prompts, self.prompts_per_step, self.seed),
            writer=self.writer(self.verifier, training=True),
            samplings=samplings_by_author(self.sampling, self.mix, self.teacher),
            mix_at=self.mix_at,
            before_step=self._before_step,
            prepare=self.module.prepare_step,
            likelihoods=self.module.likelihoods,
            now=lambda: self.module.global_step,
            limit=lambda: self.module.trainer.num_training_batches,
            engines=self.engines,
            max_staleness=self.max_staleness,
            prompts_per_step=self.prompts_per_step,
            samples_per_prompt=self.samples_per_prompt,
            teacher_samples=self.teacher.samples if self.teacher else 1,
            keep_best=self.teacher is not None and self.teacher.keep == "best",
            micro_batches=self.module.trainer.accumulate_grad_batches,
            max_tokens=self.max_tokens_per_micro_batch,
            packed=lambda: self.module.student.is_packed,
            seed=self.seed,
            ranks=Ranks.of(self.trainer),
            pad_id=self.module.student.source.pad_id,
            timer=self.module.timer,
        )

    def mix_at(self, step: int) -> RolloutMix:
        """Return the mix of optimiser step `step`: `mix` after the callbacks' `mix_at`."""
        assert self.trainer is not None
        mix = self.mix
        for callback in run_callbacks(self.trainer):
            mix = callback.mix_at(step, mix)
            where = f"{type(callback).__name__}.mix_at, step {step}"
            if not isinstance(mix, RolloutMix):
                raise UserError(
                    f"{where}: got {described(mix)}, expected a RolloutMix; return "
                    "`dataclasses.replace(mix, ...)`, or `mix` where nothing changes"
                )
            if mix != self.mix:
                mix.check_moved(self.mix, where)
        return mix

    def _before_step(self, step: int) -> None:
        assert self.trainer is not None
        for callback in run_callbacks(self.trainer):
            callback.before_step(self.trainer, step)

    def val_dataloader(self) -> list[Stream]:
        return self._streams("validate")

    def test_dataloader(self) -> list[Stream]:
        return self._streams("test")

    def _streams(self, stage: str) -> list[Stream]:
        bench = self.bench
        suites = self.suites_of(stage).items()
        return [suite.stream(name, self.loaded[name], bench) for name, suite in suites]

    def suites_of(self, stage: str) -> dict[str, Suite]:
        """Return the suites of a stage, by name; "fit" has those of "validate"."""
        return self._stages["test" if stage == "test" else "validate"]

    @property
    def bench(self) -> Bench:
        """Resources of the suites."""
        source, renderer = self.module.student.source, self.renderer(training=False)

        def checks(verifier: Verifier | None, sampling: Sampling, mix: RolloutMix) -> RowChecks:
            fits = PromptCheck(self.module, renderer, sampling, mix)
            return RowChecks(renderer, verifier, fits)

        return Bench(
            source=source,
            template_args=self.template_args,
            read=lambda prompts, checks: prompts.load(self.prompt_files.size, checks),
            checks=checks,
            writer=self.writer,
            engines=self.engines,
            ranks=Ranks.of(self.trainer),
            seed=self.seed,
            sampling=self.sampling,
            verifier=self.verifier,
        )

    def compares_with_start(self, stage: str) -> bool:
        """Return whether a suite of the stage measures how far the student is from its start."""
        return any(suite.compares_with_start for suite in self.suites_of(stage).values())

    def teardown(self, stage: str) -> None:
        self.engines.close()

    def on_exception(self, exception: BaseException) -> None:
        self.engines.close()

    def writer(self, verifier: Verifier | None, *, training: bool = False) -> RolloutWriter:
        return RolloutWriter(
            self.engines.by_author,
            verifier,
            self.renderer(training=training),
            self.module.timer,
            guided_view=self.mix.guided_view,
            only_correct=self.mix.only_correct,
            limit=self.engines.limit,
        )

    def renderer(self, *, training: bool) -> Renderer:
        """Return a renderer of the student's prompts and, for training, of the views in use.

        That of training is one object as long as the module is, since it keeps what it tokenised.
        """
        source = self.module.student.source
        if not training:
            return Renderer(source.tokenizer, self.template_args, {}, source.eos_ids)
        if self._renderer is None or self._renderer[0] is not self.module:
            names = self.module.views() | ({self.mix.guided_view} if self.mix.guided else set())
            views = {name: self.views[name] for name in sorted(names)}
            renderer = Renderer(
                source.tokenizer,
                self.template_args,
                views,
                source.eos_ids,
                context_of(self.module) if views else None,
                self.mix.reads_records,
            )
            self._renderer = self.module, renderer
        return self._renderer[1]

    def _add_suites(self, **sections: Mapping[str, Suite] | None) -> None:
        """Add suites to both stages. Raise UserError if a name is taken."""
        self.section_of = dict.fromkeys(self._stages["test"], "test")
        self.section_of |= dict.fromkeys(self._stages["validate"], "validation")
        for section, suites in sections.items():
            if taken := self.section_of.keys() & (suites or {}).keys():
                raise UserError(
                    f"data.{section}: got {min(taken)!r}, the name of another suite; rename one"
                )
            for stage in self._stages.values():
                stage |= suites or {}
            self.section_of |= dict.fromkeys(suites or {}, section)

    def _where(self) -> str:
        return f"rank {self.module.global_rank}, step {self.module.global_step}"

    def _push_weights(self, engine: Engine) -> None:
        step = self.module.global_step
        if engine.version != step:
            with self.module.timer.stage("sync"):
                push(self.module.student, engine, version=step)
