"""The DataModule all methods share: prompts in, streams of rollouts out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule

from opd_lightning import preflight
from opd_lightning.data.engines import Engines, check_engines, plan_engines, push
from opd_lightning.data.loading import load_suite, load_training
from opd_lightning.data.measuring import (
    MeasuringStream,
    asks_engine,
    longest_answer,
    longest_prompt,
    stream_of,
)
from opd_lightning.data.mix import RolloutMix, TeacherSampler, samplings_by_author
from opd_lightning.data.prompt_files import PromptFiles
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.ranks import Ranks
from opd_lightning.data.stream import TrainingStream
from opd_lightning.data.suites import EvaluationSuite, LikelihoodSuite, Loaded, Scores, Suite
from opd_lightning.data.views import PromptView, Renderer
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.errors import UserError
from opd_lightning.harness.exam import Exam
from opd_lightning.harness.task import HarnessTask
from opd_lightning.rollouts.base import Engine, Sampling
from opd_lightning.time_limit import TimeLimit
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    from opd_lightning.methods.base import DistillationModule


class RolloutDataModule(LightningDataModule):
    """Streams rollouts for the student being trained.

    Args:
        train: Prompts to train on.
        engine: Who samples the student's responses.
        mix: Who writes the responses; by default all are the student's own.
        teacher: Who writes the demonstrations of `mix.teacher`.
        verifier: Scores responses in [0, 1]; None where the method needs no reward.
        views: Prompts for other readers, by name. "privileged", unless it is listed, is the row's
            privileged text as a system message.
        validation: Suites for `opd fit` and `opd validate`, by name.
        test: Suites for `opd test`, by name.
        texts: Suites that are read and not answered, by all three, by name.
        tasks: Tasks of lm-evaluation-harness, for all three, by name.
        sampling: How responses are drawn.
        prompts_per_step: Prompts per optimiser step, over all ranks.
        samples_per_prompt: Responses of the student per prompt.
        max_staleness: 0 is strictly on-policy. 1 lets the engine write a step's rollouts while the
            step before trains, so that their weights are one optimiser step old.
        engine_time_limit: Seconds that a call of an engine may take before the run ends; 0: any.
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
        sampling: Sampling = Sampling(),  # noqa: B008
        prompts_per_step: int = 64,
        samples_per_prompt: int = 1,
        max_staleness: Literal[0, 1] = 0,
        engine_time_limit: float = 3600.0,
        template_args: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sampling.check_whole()
        self.train = train
        self.engine = engine
        self.mix = mix
        self.mix_at: Callable[[int], RolloutMix] = lambda step: mix  # a callback may move it
        self.before_step: Callable[[int], None] = lambda step: None  # a callback may listen
        self.teacher = teacher
        self.verifier = verifier
        self.user_views = set(views or {})
        self.views = {"privileged": PromptView()} | (views or {})
        self.suites: dict[str, dict[str, Suite]] = {
            "validate": {**(validation or {}), **(texts or {}), **(tasks or {})},
            "test": {**(test or {}), **(texts or {}), **(tasks or {})},
        }
        self.sampling = sampling
        self.prompts_per_step = prompts_per_step
        self.samples_per_prompt = samples_per_prompt
        self.max_staleness = max_staleness
        self.template_args = template_args or {}
        self.seed = seed
        taken = {*(validation or {}), *(test or {})}
        for room, names in (("texts", texts or {}), ("tasks", tasks or {})):
            if both := taken & names.keys():
                raise UserError(
                    f"data.{room}: got {min(both)!r}, the name of another suite; rename one"
                )
            taken |= names.keys()
        for name in ("prompts_per_step", "samples_per_prompt"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"data.{name}: got {value}, expected at least 1")
        self.prompt_files = PromptFiles()  # the trainer gives those of a run
        limit = TimeLimit(engine_time_limit, self._where, "data.engine_time_limit")
        writer = teacher.engine if teacher else None
        self.engines = Engines(engine, writer, self._push_weights, limit)
        self._train: Loaded | None = None
        self._suites: dict[str, Loaded | Exam] = {}

    @property
    def module(self) -> DistillationModule:
        """The method being trained: the streams read its student and its clock."""
        assert self.trainer is not None
        return self.trainer.lightning_module  # type: ignore[return-value]

    def setup(self, stage: str) -> None:
        """Read and check everything that can be known before weights load."""
        assert self.trainer is not None
        self.module.check()
        preflight.check_models(self.module)
        suites = self._suites_of(stage)
        if stage != "fit" and not suites:
            name = "data.test" if stage == "test" else "data.validation"
            raise UserError(f"{name}: got no suites, so there is nothing to measure; name one")
        if stage == "fit" and self._train is None:
            preflight.check_trainer(self.trainer)
            preflight.check_method(self.module, self, self.trainer)
            preflight.check_step_size(self.trainer, self)
            self._train = load_training(self)
        for name, suite in suites.items():
            self._suites[name] = load_suite(self, name, suite)
        check_engines(
            self, stage, evaluated=any(asks_engine(s, self._suites[n]) for n, s in suites.items())
        )
        self._plan_engines(suites)

    def train_dataloader(self) -> TrainingStream:
        assert self._train is not None
        return TrainingStream(
            *self._train,
            writer=self.writer(self.verifier, training=True),
            samplings=samplings_by_author(self.sampling, self.mix, self.teacher),
            mix_at=lambda step: self.mix_at(step),
            before_step=lambda step: self.before_step(step),
            prepare=self.module.prepare_step,
            now=lambda: self.module.global_step,
            engines=self.engines,
            max_staleness=self.max_staleness,
            prompts_per_step=self.prompts_per_step,
            samples_per_prompt=self.samples_per_prompt,
            micro_batches=self.module.trainer.accumulate_grad_batches,
            seed=self.seed,
            ranks=Ranks.of(self.trainer),
            pad_id=self.module.student.source.pad_id,
            timer=self.module.timer,
        )

    def val_dataloader(self) -> list[MeasuringStream]:
        return self._evaluation("validate")

    def test_dataloader(self) -> list[MeasuringStream]:
        return self._evaluation("test")

    def new_scores(self, stage: str) -> dict[str, Scores]:
        """Empty scores of every suite of a stage ("validate" or "test"), by suite name."""
        suites: dict[str, Any] = self._suites_of(stage)
        return {name: suite.scores(self._suites[name]) for name, suite in suites.items()}

    def loaded(self, suite: str) -> Loaded | Exam:
        """What a suite measures, once it is set up."""
        return self._suites[suite]

    def compares_with_start(self, stage: str) -> bool:
        """Whether a suite of the stage measures how far the student is from its start."""
        suites = self._suites_of(stage).values()
        return any(isinstance(s, LikelihoodSuite) and s.compare_with_start for s in suites)

    def teardown(self, stage: str) -> None:
        self.engines.close()

    def on_exception(self, exception: BaseException) -> None:
        self.engines.close()

    def _suites_of(self, stage: str) -> dict[str, Suite]:
        return self.suites["test" if stage == "test" else "validate"]

    def _evaluation(self, stage: str) -> list[MeasuringStream]:
        suites = self._suites_of(stage).items()
        return [stream_of(self, name, suite, self._suites[name]) for name, suite in suites]

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
        """Renders the student's prompts and, for training, every view that is read."""
        names = self.module.views() | ({self.mix.guided_view} if self.mix.guided else set())
        views = {name: self.views[name] for name in sorted(names)} if training else {}
        source = self.module.student.source
        return Renderer(source.tokenizer, self.template_args, views, source.eos_ids)

    def _plan_engines(self, suites: dict[str, Suite]) -> None:
        """Engines are started for the longest sequence that any stream may ask of them."""
        given = [longest_prompt(suite, self._suites[name]) for name, suite in suites.items()]
        longest = max([*given, *map(len, self._train.ids if self._train else [])], default=0)
        if self.mix.guided and self._train is not None:
            renderer = self.renderer(training=True)
            views = (renderer.view(self.mix.guided_view, p) for p in self._train.prompts)
            longest = max(longest, *(len(ids or ()) for ids in views))
        answers = [longest_answer(self._suites[name]) for name in suites]
        plan_engines(self, longest, max(answers, default=0))

    def _where(self) -> str:
        return f"rank {self.module.global_rank}, step {self.module.global_step}"

    def _push_weights(self, engine: Engine) -> None:
        step = self.module.global_step
        if engine.version != step:
            with self.module.timer.stage("sync"):
                push(self.module.student, engine, version=step)
