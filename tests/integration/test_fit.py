"""Training runs on untrained tiny models: what must hold before any figure means something."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import EMATeacherUpdate
from opd_lightning.cli import main
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.evaluation import module as evaluation
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.evaluation.texts import LikelihoodSuite
from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.methods import GOPD, OPD, SFT, DistillationModule, DivergenceOPD
from opd_lightning.models.student import Student
from opd_lightning.models.weight_sums import EngineSum
from opd_lightning.rollouts import Engine, HFEngine, Sampling
from opd_lightning.rules import TruncatedImportance
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.teachers import AdapterOffTeacher, EMATeacher, FrozenTeacher
from opd_lightning.training.callback import RunCallback
from opd_lightning.types import Prompt, RolloutBatch
from opd_lightning.verifiers import ExactMatch, Verifier

CONFIG = str(Path(__file__).parents[2] / "configs" / "lab" / "opd.yaml")


class Recorder(Callback):
    """Keeps the gradients before each optimiser step and every logged value after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.student.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step > len(self.logged):
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class MicroBatches(RunCallback):
    """Counts the micro-batches of every step."""

    def __init__(self) -> None:
        self.of_step: list[int] = []

    def after_loss(self, trainer: Any, module: Any, batch: RolloutBatch) -> None:
        if batch.totals.step == len(self.of_step):
            self.of_step.append(0)
        self.of_step[-1] += 1


def fit(
    method: DistillationModule,
    *,
    engine: Engine | Literal["hf"] | None = "hf",
    steps: int = 3,
    micro_batches: int = 1,
    callbacks: Iterable[Callback] = (),
    ckpt_path: str | None = None,
    trainer: dict[str, Any] | None = None,
    **data: Any,
) -> Recorder:
    """Train in the untrained lab, the working folder; return the records."""
    recorder = Recorder()
    lightning = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder, *callbacks],
        log_every_n_steps=1,
        **trainer or {},
    )
    defaults: dict[str, Any] = {
        "train": PromptSource("lab/arithmetic/train.jsonl"),
        "verifier": ExactMatch(ANSWER_PATTERN),
        "sampling": Sampling(max_new_tokens=12),
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
    }
    datamodule = RolloutDataModule(
        engine=HFEngine() if engine == "hf" else engine, **defaults | data
    )
    lightning.fit(method, datamodule=datamodule, ckpt_path=ckpt_path)
    return recorder


def method_of(
    kind: type[OPD | DivergenceOPD] = OPD,
    teacher: str = "teacher",
    lr: float = 1e-2,
    **more: Any,
) -> DistillationModule:
    return kind(
        Student("lab/arithmetic/student", lora=more.pop("lora", None)),
        teacher=FrozenTeacher(f"lab/arithmetic/{teacher}"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr),
        **{"max_logprob_gap": 1e-4, **more},
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def sft_method() -> SFT:
    student = Student("lab/arithmetic/student")
    return SFT(student, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))


def weights(source: DistillationModule | str) -> dict[str, Tensor]:
    """Of a method's student, or of a model folder."""
    student = Student(source) if isinstance(source, str) else source.student
    student.load()
    return {name: tensor.clone() for name, tensor in student.weights()}


@pytest.mark.usefixtures("in_lab")
def test_progress_bars_show_what_is_logged() -> None:
    class Shown(Callback):
        last: ClassVar[dict[str, Any]] = {}

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.last.update(trainer.progress_bar_metrics)

    shown = Shown()
    logged = fit(method_of(), steps=2, callbacks=[shown]).logged[-1]
    assert shown.last.keys() == {"loss", "reward", "tokens_per_second"}
    assert shown.last == pytest.approx({name: logged[name] for name in shown.last})


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(("kind", "engine"), [(OPD, HFEngine), (DivergenceOPD, HFEngine)])
def test_engine_and_trainer_agree_at_every_step(
    kind: type[OPD | DivergenceOPD], engine: type[Engine]
) -> None:
    seen = fit(method_of(kind), engine=engine(), steps=3, micro_batches=2)
    assert len(seen.logged) == 3
    for logged in seen.logged:
        assert 0 < logged["engine/logprob_gap_max"] < 1e-4
        assert logged["response/tokens_per_step"] > 0
        assert logged["optim/gradient_norm"] > 0
    assert seen.logged[0]["loss"] != seen.logged[1]["loss"]


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(("kind", "temperature"), [(OPD, 1.0), (DivergenceOPD, 0.6)])
def test_u3_a_student_that_is_its_own_teacher_stands_still(
    kind: type[OPD | DivergenceOPD], temperature: float
) -> None:
    seen = fit(
        method_of(kind, teacher="student"),
        steps=1,
        sampling=Sampling(max_new_tokens=12, temperature=temperature),
    )
    assert abs(seen.logged[0]["loss"]) < 1e-6
    assert max(g.abs().max() for g in seen.gradients[0].values()) < 1e-6


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(
    "aggregation",
    [
        "seq-mean-token-mean",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ("token-mean", "seq-mean-token-sum")),
    ],
)
def test_u5_four_micro_batches_are_one(aggregation: Any) -> None:
    one = fit(method_of(aggregation=aggregation), steps=1)
    four = fit(method_of(aggregation=aggregation), steps=1, micro_batches=4)
    torch.testing.assert_close(one.gradients[0], four.gradients[0], atol=1e-6, rtol=0)
    same = ("loss", "signal/log_ratio_q05", "response/length", "entropy/student", "reward")
    for name in same:
        assert one.logged[0][name] == pytest.approx(four.logged[0][name], abs=1e-5)
    assert max(g.abs().max() for g in one.gradients[0].values()) > 1e-3


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(
    "precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)]
)
def test_a_budget_is_the_run_of_as_many_micro_batches(precision: str) -> None:
    """Bit for bit, clipped gradients and figures too; and one micro-batch, to rounding."""
    settings: dict[str, Any] = {"trainer": {"precision": precision, "gradient_clip_val": 0.05}}
    settings |= {"steps": 1, "micro_batches": 1}
    counted = MicroBatches()
    loose: dict[str, Any] = {"max_logprob_gap": 1.0}
    budget = fit(method_of(**loose), **settings, max_tokens_per_micro_batch=48, callbacks=[counted])
    (parts,) = counted.of_step
    assert parts > 2
    many = fit(method_of(**loose), **settings | {"micro_batches": parts})
    torch.testing.assert_close(budget.gradients, many.gradients, atol=0, rtol=0)
    clock = ("time/", "cost/", "tokens_per_second")
    same = {name: value for name, value in many.logged[0].items() if not name.startswith(clock)}
    assert {name: budget.logged[0][name] for name in same} == pytest.approx(
        same, abs=0, nan_ok=True
    )
    if precision == "32-true":
        one = fit(method_of(**loose), **settings)
        torch.testing.assert_close(budget.gradients, one.gradients, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("adapts", [pytest.param(False, marks=pytest.mark.slow), True])
def test_packed_rows_train_as_padded_ones(adapts: bool) -> None:
    """The student, a teacher of its own and the student as its own teacher, under two prompts."""
    lora = LoraConfig(r=4, target_modules="all-linear") if adapts else None

    def run(packing: Literal["on", "off"]) -> Recorder:
        torch.manual_seed(0)
        student = Student("lab/arithmetic/student", lora=lora, packing=packing)
        frozen = FrozenTeacher("lab/arithmetic/teacher", packing=packing)
        other = AdapterOffTeacher() if adapts else EMATeacher(rate=0.5)
        method = GOPD(student, frozen, other, scale=1.5, optimizer=sgd)
        return fit(method, callbacks=[EMATeacherUpdate()], steps=3, micro_batches=2)

    packed, padded = run("on"), run("off")
    for ours, expected in zip(packed.gradients, padded.gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    losses = [[logged["loss"] for logged in seen.logged] for seen in (packed, padded)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.usefixtures("in_lab")
def test_steps_of_different_numbers_of_micro_batches_move_the_optimiser_once_each() -> None:
    counted, method = MicroBatches(), method_of(lr=1e-3)
    method.lr_scheduler = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)
    seen = fit(method, steps=4, callbacks=[counted], max_tokens_per_micro_batch=30)
    assert len(counted.of_step) == len(seen.gradients) == 4
    assert len(set(counted.of_step)) > 1
    rates = [logged["optim/learning_rate"] for logged in seen.logged]
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


@pytest.mark.usefixtures("in_lab")
def test_a_run_repeats_itself_and_another_seed_does_not() -> None:
    runs = []
    for seed in (0, 0, 1):
        method = method_of()
        fit(method, seed=seed, steps=2)
        runs.append(weights(method))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def fit_in_passes(method: DistillationModule, *, steps: int, **more: Any) -> Recorder:
    """Train with passes over the prompts of four steps."""
    few = PromptSource("lab/arithmetic/train.jsonl", limit=16)
    return fit(method, steps=steps, micro_batches=2, train=few, **more)


@pytest.fixture(scope="module")
def unbroken(untrained_lab: Path) -> tuple[Recorder, dict[str, Tensor]]:
    """A run of six steps, and the weights that it ends with."""
    whole = method_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(untrained_lab)
        return fit_in_passes(whole, steps=6), weights(whole)


@pytest.mark.usefixtures("in_lab")
# In the first pass over the prompts, and at its end.
@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_resume_continues_bit_for_bit(
    stop: int, unbroken: tuple[Recorder, dict[str, Tensor]], tmp_path: Path
) -> None:
    whole, final = unbroken
    first, second = method_of(), method_of()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_last=True, save_top_k=0)
    fit_in_passes(first, steps=stop, callbacks=[saver])
    resumed = fit_in_passes(second, steps=6, ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(resumed.gradients) == 6 - stop
    for step, gradients in enumerate(resumed.gradients, start=stop):
        torch.testing.assert_close(gradients, whole.gradients[step], atol=0, rtol=0)
    torch.testing.assert_close(weights(second), final, atol=0, rtol=0)


class DeafEngine(HFEngine):
    """Engine that reports new weights without loading them."""

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        if version == 0:
            super().load_weights(version, weights)
        self.version = version


class ForgetfulEngine(DeafEngine):
    """Engine that consumes new weights and keeps the old ones."""

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().load_weights(version, weights)
        for _ in weights:
            pass


class SecretiveEngine(ForgetfulEngine):
    """Engine that also has no sums of its weights, as some builds of vLLM."""

    def weight_sums(self) -> list[EngineSum]:
        return []


class StuckEngine(SecretiveEngine):
    """Engine that ignores pushes and reports version 0."""

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().load_weights(version, weights)
        self.version = 0


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (DeafEngine, "step 1: the engine did not take the weights that were pushed"),
        (ForgetfulEngine, "step 1: after the push the engine's 'model.embed_tokens.weight' has"),
        (SecretiveEngine, "step 1: engine and trainer log-probs of the sampled tokens differ by"),
        (StuckEngine, "step 1: got rollouts of weights of version 0, expected version 1"),
    ],
)
def test_a_stale_engine_stops_the_run_in_the_same_step(engine: type[Engine], said: str) -> None:
    with pytest.raises(RunStoppedError, match=said):
        fit(method_of(), engine=engine())


@pytest.mark.usefixtures("in_lab")
def test_a_run_that_is_stopped_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    deaf = f"--data.engine={__name__}.DeafEngine"
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", CONFIG, "--trainer.logger=false", deaf, *FAST])
    assert ended.value.code == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error:")]
    assert len(lines) == 1
    assert "step 1: the engine did not take the weights that were pushed" in lines[0]


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("engine", [HFEngine])
def test_rollouts_written_ahead_are_trained_on_and_corrected(engine: type[Engine]) -> None:
    """One step old, in a thread: two runs agree, and the first step is proved as ever."""
    runs = []
    for _ in range(2):
        method = method_of(rules=[TruncatedImportance()])
        state = torch.get_rng_state()
        seen = fit(method, engine=engine(), steps=4, micro_batches=2, max_staleness=1)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append((weights(method), [logged["loss"] for logged in seen.logged]))
    torch.testing.assert_close(runs[0], runs[1], atol=0, rtol=0)
    first, *others = seen.logged
    assert first["engine/compared"] == 1
    assert 0 < first["engine/logprob_gap_max"] < 1e-4
    for logged in others:
        assert logged["engine/compared"] == 0
        # A learning rate of 1e-2: a step makes another policy.
        assert logged["engine/importance_max"] > 1.05
    assert seen.logged[3]["time/generate_hidden_seconds"] > 0  # of the step before


@pytest.mark.usefixtures("in_lab")
def test_a_step_logs_no_figure_of_an_earlier_one(tmp_path: Path) -> None:
    """One step old, nothing but step 0 has fresh rollouts to take the gap of."""
    words = ["--data.max_staleness=1", "--model.init_args.surrogate.ratio_to=sampler"]
    words += [f"--trainer.logger.init_args.save_dir={tmp_path}", "--data.validation=null", *FAST]
    main(["fit", "--config", CONFIG, *words])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("engine/compared")] == [0, 1, 2]
    assert [event.step for event in events.Scalars("engine/logprob_gap_max")] == [0]
    assert [event.step for event in events.Scalars("time/step_seconds")] == [1, 2]


class Epochs(Callback):
    """Callback that records the epoch of every step."""

    def __init__(self) -> None:
        self.of_step: dict[int, int] = {}

    def on_before_zero_grad(self, trainer: Any, *_: Any) -> None:
        self.of_step[trainer.global_step] = trainer.current_epoch


@pytest.mark.usefixtures("in_lab")
def test_epochs_that_are_cut_are_of_one_length(tmp_path: Path) -> None:
    """Passes over the prompts take four steps."""
    whole, resumed = Epochs(), Epochs()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True, save_top_k=0)
    cut = {"limit_train_batches": 6}
    fit_in_passes(method_of(), steps=7, trainer=cut, callbacks=[whole, saver])
    last = str(tmp_path / "last.ckpt")
    fit_in_passes(method_of(), steps=7, trainer=cut, callbacks=[resumed], ckpt_path=last)
    assert whole.of_step == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2}
    assert resumed.of_step == {step: whole.of_step[step] for step in (4, 5, 6)}


@pytest.mark.usefixtures("in_lab")
def test_a_sanity_check_logs_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrations = "lab/arithmetic/demonstrations.jsonl"
    logged: list[int] = []
    monkeypatch.setattr(
        evaluation, "write_validation", lambda trainer, *_: logged.append(trainer.global_step)
    )
    texts = {
        "held_out": LikelihoodSuite(prompts=PromptSource(demonstrations, limit=4), batch_size=1)
    }
    checked = {"num_sanity_val_steps": 1, "val_check_interval": 1}
    fit(method_of(), steps=1, trainer=checked, texts=texts)
    assert logged == [1]


@pytest.mark.usefixtures("in_lab")
def test_a_step_that_would_be_cut_short_is_refused() -> None:
    with pytest.raises(UserError, match="limit_train_batches: got 3 micro-batches"):
        fit(method_of(), micro_batches=2, trainer={"limit_train_batches": 3})


FAST = [
    "--trainer.max_steps=3",
    "--trainer.val_check_interval=4",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.enable_progress_bar=false",
    "--data.prompts_per_step=8",
    "--data.samples_per_prompt=2",
    "--data.sampling.max_new_tokens=16",
]

# The figures that papers report, as far as they apply to OPD.
LOGGED = {
    "loss", "reward", "response/degenerate_groups", "tokens_per_second",
    "signal/log_ratio_mean", "signal/log_ratio_abs_mean", "signal/positive", "overlap/ratio",
    *(f"signal/log_ratio_q{q}" for q in ("01", "05", "95", "99")),
    "signal/agree_with_reward", "signal/disagree_with_reward",
    "entropy/student", "entropy/teacher", "entropy/gap",
    "engine/logprob_gap_mean", "engine/logprob_gap_max",
    "engine/importance_mean", "engine/importance_max", "engine/importance_ess",
    "response/length", "response/truncated", "response/repetitive", "response/tokens_per_step",
    "optim/gradient_norm", "optim/learning_rate", "time/overhead",
    *(f"{group}/{stage}_{unit}" for group, unit in (("time", "seconds"), ("cost", "us_per_token"))
      for stage in (
        "sync", "generate", "verify", "student", "teacher", "backward", "optimizer", "step")),
}  # fmt: skip


def shown_rows(page: str) -> list[dict[str, Any]]:
    """Return the data of a page of coloured tokens."""
    _, _, rest = page.partition('id="rows">')
    rows: list[dict[str, Any]] = json.loads(rest.partition("</script>")[0])
    return rows


@pytest.fixture(scope="module")
def finished(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `opd fit`; only a test marked `last` may write to it."""
    run = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(untrained_lab)
        main(["fit", "--config", CONFIG, f"--trainer.logger.init_args.save_dir={run}", *FAST])
    return run


def test_a_user_sees_the_run_and_exports_the_student(
    finished: Path, in_lab: Path, tmp_path: Path
) -> None:
    run, out = finished, tmp_path / "student"
    events = EventAccumulator(str(run))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= LOGGED, LOGGED - scalars
    assert len(events.Scalars("loss")) == 3
    assert "val/sums/score/add-2" in scalars
    (entry, *_) = events.Tensors("rollouts/text_summary")
    assert "| prompt | author | response |" in entry.tensor_proto.string_val[0].decode()
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 4
    assert all(len(line["logprobs"]) >= len(line["response"]) > 0 for line in lines)
    rows = shown_rows((run / "rollouts/000000.html").read_text())
    assert len(rows) == 4
    for row in rows:
        assert row["figures"].keys() == {"log_ratio", "advantage", "selected"}
        assert {len(values) for values in row["figures"].values()} == {len(row["tokens"])}
        assert row["figures"]["advantage"] == row["figures"]["log_ratio"]  # what OPD is
        assert any(row["figures"]["log_ratio"])

    checkpoint = run / "checkpoints" / "last.ckpt"
    config = str(run / "config.yaml")
    main(["export", "--config", config, f"--ckpt_path={checkpoint}", f"--out={out}", "--card"])
    card = (out / "README.md").read_text()
    assert "\n| method | OPD |\n" in card
    assert "\n| sums | score |" in card
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not [name for name in saved if "teacher" in name]
    exported = Student(str(out))
    exported.load()
    for name, tensor in exported.weights():
        assert torch.equal(tensor, saved[f"student.model.{name}"]), name


@pytest.mark.last
def test_measuring_a_run_leaves_it_alone(finished: Path, in_lab: Path) -> None:
    run = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    main(["validate", "--config", str(run / "config.yaml")])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    last = run / "checkpoints" / "last.ckpt"
    longer = ["--trainer.max_steps=4", f"--ckpt_path={last}"]
    main(["fit", "--config", str(run / "config.yaml"), *longer])
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_a_new_run_in_an_old_folder_is_refused(
    in_lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dir = f"--trainer.logger.init_args.save_dir={tmp_path}"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(SystemExit):
        main(["fit", "--config", CONFIG, save_dir, *FAST])
    assert "holds the checkpoints of an earlier run" in capsys.readouterr().err


@pytest.mark.usefixtures("in_lab")
def test_a_datamodule_serves_twice() -> None:
    suite = EvaluationSuite(prompts=PromptSource("lab/arithmetic/held_out.jsonl"))
    data = RolloutDataModule(
        train=PromptSource("lab/arithmetic/train.jsonl"),
        engine=HFEngine(),
        verifier=ExactMatch(ANSWER_PATTERN),
        test={"sums": suite},
        sampling=Sampling(max_new_tokens=8),
        prompts_per_step=4,
    )
    method = method_of()
    trainer = Trainer(
        accelerator="cpu", max_steps=2, max_epochs=-1, logger=False, enable_checkpointing=False
    )
    trainer.fit(method, datamodule=data)
    (values,) = trainer.test(method, datamodule=data, verbose=False)
    assert "test/sums/score" in values


@pytest.mark.usefixtures("in_lab")
def test_export_refuses_what_would_surprise(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "some.ckpt").touch()
    cases = (("none.ckpt", "new", "--ckpt_path: "), ("some.ckpt", "full", "is not empty"))
    for checkpoint, out, message in cases:
        with pytest.raises(UserError, match=message):
            Trainer(accelerator="cpu", logger=False).export(
                method_of(), str(tmp_path / checkpoint), str(tmp_path / out)
            )
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("in_lab")
def test_lora_student_trains_and_reaches_the_engine() -> None:
    method = method_of(lora=LoraConfig(r=4, target_modules="all-linear"))
    # The engine's own check holds the gap under 1e-4 at every step, or stops the run.
    seen = fit(method)
    assert seen.gradients[0]
    assert all("lora_" in name for name in seen.gradients[0])
    base, merged = weights("lab/arithmetic/student"), weights(method)
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.usefixtures("in_lab")
def test_sft_lowers_its_loss_on_recorded_responses() -> None:
    seen = fit(
        sft_method(),
        steps=20,
        train=PromptSource("lab/arithmetic/demonstrations.jsonl"),
        samples_per_prompt=1,
        prompts_per_step=32,
        engine=None,
        mix=RolloutMix(recorded=1),
    )
    losses = [logged["loss"] for logged in seen.logged]
    assert losses[0] == pytest.approx(torch.tensor(64.0).log().item(), abs=0.4)
    assert losses[-1] < 0.6 * losses[0]
    assert not [name for name in seen.logged[0] if name.startswith(("engine/", "signal/"))]


class SumsAreRight(Verifier):
    """Half a point for any sum, none for differences: a score that follows the prompt."""

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [0.5 * prompt.domain.startswith("add") for prompt in prompts]


@pytest.mark.usefixtures("in_lab")
def test_validation_scores_by_domain() -> None:
    results = []
    for _ in range(2):
        suite = EvaluationSuite(prompts=PromptSource("lab/arithmetic/held_out.jsonl"), samples=2)
        data = RolloutDataModule(
            engine=HFEngine(),
            verifier=SumsAreRight(),
            validation={"sums": suite},
            sampling=Sampling(max_new_tokens=8),
        )
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        results += trainer.validate(method_of(), datamodule=data, verbose=False)
    assert results[0] == results[1]
    assert results[0]["val/sums/score/add-2"] == 0.5
    assert results[0]["val/sums/score/sub-2"] == 0.0
    assert results[0]["val/sums/score"] == 0.25
    assert 1 <= results[0]["val/sums/length"] <= 8
