"""The DataModule all methods share: prompts in, streams of rollouts out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule

from opd_lightning import preflight
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.stream import EvaluationStream, Ranks, TrainingStream
from opd_lightning.data.suites import EvaluationSuite
from opd_lightning.data.views import render
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Engine, Sampling
from opd_lightning.types import Prompt
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    from opd_lightning.methods.base import DistillationModule


@dataclass(frozen=True, slots=True)
class _Loaded:
    prompts: list[Prompt]
    ids: list[list[int]] = field(repr=False)


class RolloutDataModule(LightningDataModule):
    """Streams rollouts of the student being trained.

    Args:
        train: Prompts to train on.
        engine: Who samples responses.
        recorded: Train on the responses recorded in the prompt file instead of sampled ones; the
            engine, if there is one, is for validation.
        verifier: Scores responses in [0, 1]; None where the method needs no reward.
        validation: Suites for `opd fit` and `opd validate`, by name.
        test: Suites for `opd test`, by name.
        sampling: How responses are drawn.
        prompts_per_step: Prompts per optimiser step, over all ranks.
        samples_per_prompt: Responses per prompt.
        template_args: Extra variables for the chat template.
        seed: Seed of prompt order and sampling.
    """

    def __init__(
        self,
        train: PromptSource | None = None,
        engine: Engine | None = None,
        recorded: bool = False,
        verifier: Verifier | None = None,
        validation: dict[str, EvaluationSuite] | None = None,
        test: dict[str, EvaluationSuite] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen, and shown by --help
        prompts_per_step: int = 64,
        samples_per_prompt: int = 1,
        template_args: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("prompts_per_step", prompts_per_step),
            ("samples_per_prompt", samples_per_prompt),
        ):
            if value < 1:
                raise UserError(f"data.{name}: got {value}, expected at least 1")
        if recorded and samples_per_prompt > 1:
            raise UserError(
                f"data.samples_per_prompt: got {samples_per_prompt} with data.recorded, but a "
                "recorded response is one response; set it to 1 or sample with an engine"
            )
        if sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k > 0:
            raise UserError(
                f"data.sampling: got {sampling}, but training needs samples of the policy's whole "
                "distribution: temperature above 0, top_p 1, top_k 0; a suite's own sampling may "
                "be greedy or truncated"
            )
        self.train = train
        self.engine = engine
        self.recorded = recorded
        self.verifier = verifier
        self.suites = {"validate": validation or {}, "test": test or {}}
        self.sampling = sampling
        self.prompts_per_step = prompts_per_step
        self.samples_per_prompt = samples_per_prompt
        self.template_args = template_args or {}
        self.seed = seed
        self._train: _Loaded | None = None
        self._suites: dict[str, _Loaded] = {}
        self._engine_started = False

    @property
    def module(self) -> DistillationModule:
        """The method being trained: the streams read its student and its clock."""
        assert self.trainer is not None
        return self.trainer.lightning_module  # type: ignore[return-value]

    def setup(self, stage: str) -> None:
        """Read and check everything that can be known before weights load."""
        assert self.trainer is not None
        preflight.check_models(self.module)
        if stage != "fit" and not self._suites_of(stage):
            name = "data.test" if stage == "test" else "data.validation"
            raise UserError(f"{name}: got no suites, so there is nothing to measure; name one")
        if stage == "fit" and self._train is None:
            if self.train is None:
                raise UserError("data.train: got nothing, expected a prompt file to train on")
            preflight.check_trainer(self.trainer)
            self._check_step_size()
            self._train = self._load(self.train, self.sampling, recorded=self.recorded)
        samples = stage == "fit" and not self.recorded
        if self.engine is None and (samples or self._suites_of(stage)):
            raise UserError(
                "data.engine: got nothing, but responses must be sampled; set an engine, e.g. "
                "opd_lightning.rollouts.HFEngine, or train on data.recorded without validation"
            )
        for name, suite in self._suites_of(stage).items():
            self._suites[name] = self._load(suite.prompts, suite.sampling or self.sampling)

    def train_dataloader(self) -> TrainingStream:
        assert self.trainer is not None
        assert self._train is not None
        return TrainingStream(
            self._train.prompts,
            self._train.ids,
            writer=self._writer(None if self.recorded else self.engine),
            # Nothing was sampled from recorded responses: their loss is the plain one.
            sampling=Sampling() if self.recorded else self.sampling,
            prompts_per_step=self.prompts_per_step,
            samples_per_prompt=self.samples_per_prompt,
            micro_batches=self.trainer.accumulate_grad_batches,
            seed=self.seed,
            ranks=self._ranks(),
            pad_id=self.module.student.source.pad_id,
            timer=self.module.timer,
        )

    def val_dataloader(self) -> list[EvaluationStream]:
        return self._evaluation("validate")

    def test_dataloader(self) -> list[EvaluationStream]:
        return self._evaluation("test")

    def domains(self, stage: str) -> dict[str, list[str]]:
        """The domains of every suite of a stage ("validate" or "test"), by suite name."""
        return {
            name: sorted({prompt.domain for prompt in self._suites[name].prompts})
            for name in self._suites_of(stage)
        }

    def teardown(self, stage: str) -> None:
        self._close_engine()

    def on_exception(self, exception: BaseException) -> None:
        self._close_engine()

    def _close_engine(self) -> None:
        if self.engine is not None and self._engine_started:
            self.engine.close()
            self._engine_started = False

    def _suites_of(self, stage: str) -> dict[str, EvaluationSuite]:
        return self.suites["test" if stage == "test" else "validate"]

    def _evaluation(self, stage: str) -> list[EvaluationStream]:
        return [
            EvaluationStream(
                name,
                self._suites[name].prompts,
                self._suites[name].ids,
                writer=self._writer(self.engine),
                sampling=suite.sampling or self.sampling,
                samples=suite.samples,
                batch_size=suite.batch_size,
                seed=self.seed,
                ranks=self._ranks(),
            )
            for name, suite in self._suites_of(stage).items()
        ]

    def _writer(self, engine: Engine | None) -> RolloutWriter:
        module = self.module
        tokenizer = module.student.source.tokenizer
        return RolloutWriter(engine, self._push_weights, self.verifier, tokenizer, module.timer)

    def _load(self, source: PromptSource, sampling: Sampling, *, recorded: bool = False) -> _Loaded:
        """Prompts with their ids, checked against the verifier and the models' contexts."""
        prompts = source.load()
        if self.verifier is not None:
            self.verifier.check(prompts)
        tokenizer = self.module.student.source.tokenizer
        ids = [render(prompt, tokenizer, self.template_args) for prompt in prompts]
        preflight.check_prompts(self.module, prompts, ids, sampling, recorded=recorded)
        return _Loaded(prompts, ids)

    def _check_step_size(self) -> None:
        assert self.trainer is not None
        world, parts = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if self.prompts_per_step % world:
            raise UserError(
                f"data.prompts_per_step: got {self.prompts_per_step} for {world} processes, "
                "expected a multiple of their number"
            )
        rollouts = self.prompts_per_step // world * self.samples_per_prompt
        if rollouts < parts:
            raise UserError(
                f"trainer.accumulate_grad_batches: got {parts} for {rollouts} rollouts a step per "
                "process, expected at most one micro-batch per rollout; lower it or raise "
                "data.prompts_per_step"
            )

    def _ranks(self) -> Ranks:
        assert self.trainer is not None
        strategy = self.trainer.strategy

        def add_up(value: int) -> int:
            here = torch.tensor(value, dtype=torch.int64, device=strategy.root_device)
            return int(strategy.reduce(here, reduce_op="sum"))

        return Ranks(rank=self.trainer.global_rank, world_size=self.trainer.world_size, sum=add_up)

    def _push_weights(self) -> None:
        """Give the engine the student as it is now, unless it has it."""
        assert self.trainer is not None
        assert self.engine is not None
        module = self.module
        with module.timer.stage("sync"):
            if not self._engine_started:
                longest = max(
                    len(ids) for loaded in self._all_loaded() for ids in loaded.ids
                ) + max(s.max_new_tokens for s in self._all_samplings())
                self.engine.start(module.student.source, max_length=longest)
                self._engine_started = True
            if self.engine.version != self.trainer.global_step:
                self.engine.load_weights(self.trainer.global_step, module.student.weights())

    def _all_loaded(self) -> list[_Loaded]:
        return [*([self._train] if self._train else []), *self._suites.values()]

    def _all_samplings(self) -> list[Sampling]:
        suites = [s for stage in self.suites.values() for s in stage.values()]
        return [self.sampling, *(s.sampling for s in suites if s.sampling is not None)]
