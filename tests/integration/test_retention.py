"""CapabilityRetention in runs: figures, Pareto checkpoints, actions, resumption."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import CapabilityRetention
from opd_lightning.commands.export import load_student
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.evaluation.tasks import HarnessTask
from opd_lightning.evaluation.texts import LikelihoodSuite
from opd_lightning.methods import SFT
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.verifiers import RegexMatch
from tests.comparing import scalars, tensors
from tests.harness_tasks import write_tasks

STEPS, EVERY = 6, 2
SUMS = "lab/arithmetic/demonstrations.jsonl"


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Texts whose likelihood falls when the student learns to write digits."""
    path = tmp_path_factory.mktemp("letters") / "letters.jsonl"
    rows = [{"messages": f"{i}", "response": "abcdefgh"[i:]} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fit(
    folder: Path,
    letters: str,
    callback: CapabilityRetention,
    *,
    steps: int = STEPS,
    save_every: int | None = EVERY,
    resume: str | None = None,
    tasks: dict[str, HarnessTask] | None = None,
) -> dict[str, Tensor]:
    """Train on subtractions, towards their likelihood; the weights at the end.

    Saved every `save_every` steps, or after every validation if None.
    """
    method = SFT(
        Student("lab/arithmetic/student"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=STEPS),
    )
    data = RolloutDataModule(
        train=PromptSource(SUMS, domains=["sub-2"]),
        mix=RolloutMix(recorded=1),
        engine=HFEngine(),
        sampling=Sampling(max_new_tokens=4),
        prompts_per_step=4,
        validation={
            "written": EvaluationSuite(
                prompts=PromptSource(SUMS, domains=["add-2"], limit=6),
                verifier=RegexMatch(r"[a-m]"),
            ),
        },
        texts={
            "target": LikelihoodSuite(prompts=PromptSource(SUMS, domains=["sub-2"], limit=5)),
            "letters": LikelihoodSuite(prompts=PromptSource(letters), batch_size=3),
        },
        tasks=tasks,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(str(folder), name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            callback,
            ModelCheckpoint(folder / "checkpoints", every_n_train_steps=save_every, save_top_k=-1,
                            filename="{step}", save_last=True, save_on_train_epoch_end=False),
        ],
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(method, datamodule=data, ckpt_path=resume)
    return {name: tensor.clone() for name, tensor in method.student.weights()}


def logged(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {t: [e.value for e in events.Scalars(t)] for t in events.Tags()["scalars"]}


@pytest.mark.usefixtures("in_deep_lab")
def test_a_run_begins_again_before_its_first_checkpoint(
    letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(resume: str | None) -> None:
        callback = CapabilityRetention(["target"])
        fit(tmp_path, letters, callback, steps=EVERY, save_every=EVERY, resume=resume)

    run("last")
    for file in (tmp_path / "checkpoints").iterdir():  # its node failed before it saved
        file.unlink()
    pareto = tmp_path / "pareto"
    earlier = pareto / f"step-{EVERY:06d}.ckpt"
    assert earlier.exists()
    (pareto / "step-000050.ckpt").touch()
    with pytest.raises(UserError, match="holds the students of an earlier run"):
        run(None)
    assert earlier.exists()
    run("last")
    assert "removed 2 students from before the restart" in capsys.readouterr().err
    assert sorted(path.name for path in pareto.iterdir()) == ["index.json", earlier.name]


@pytest.mark.usefixtures("in_deep_lab")
def test_a_run_measures_its_start_and_keeps_the_front(letters: str, tmp_path: Path) -> None:
    callback = CapabilityRetention(["target"])
    final = fit(tmp_path, letters, callback)
    found = logged(tmp_path)
    for name in ("target", "letters"):
        assert found[f"val/{name}/kl"][0] == 0
        assert found[f"retention/delta/{name}"][0] == 0
        assert min(found[f"val/{name}/kl"][1:]) > 0
    assert len(found["retention/worst"]) == 1 + STEPS // EVERY
    assert found["retention/gain"][-1] > 0.1
    assert found["retention/delta/letters"][-1] < -0.1
    delta = found["val/target/log_likelihood"][-1] - found["val/target/log_likelihood"][0]
    assert found["retention/gain"][-1] == pytest.approx(delta, abs=1e-5)
    worst = min(found["retention/delta/letters"][-1], found["retention/delta/written"][-1])
    assert found["retention/worst"][-1] == pytest.approx(worst)

    index = json.loads((tmp_path / "pareto" / "index.json").read_text())
    assert [p["step"] for p in index["points"]] == [p.step for p in callback.points]
    assert index["points"][0] | {"scores": None} == {
        "step": 0, "gain": 0.0, "retention": 0.0, "scores": None, "checkpoint": None,
    }  # fmt: skip
    names = {p["checkpoint"] for p in index["points"]} - {None}
    assert names == {path.name for path in (tmp_path / "pareto").glob("*.ckpt")}
    student = Student("lab/arithmetic/student")
    assert load_student(student, str(tmp_path / "pareto" / f"step-{STEPS:06d}.ckpt")).step == STEPS
    torch.testing.assert_close(dict(student.weights()), final, atol=0, rtol=0)


@pytest.mark.usefixtures("in_deep_lab")
def test_a_task_of_the_harness_is_an_ability(letters: str, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    folder = write_tasks(tmp_path / "tasks")
    rolling = HarnessTask(task="rolling", include_path=folder)
    fit(tmp_path, letters, CapabilityRetention(["target"]), steps=2, tasks={"prose": rolling})
    found = logged(tmp_path)
    start, now = found["val/prose/bits_per_byte"]
    assert now > start
    scores = found["val/prose/score"]
    assert found["retention/delta/prose"] == pytest.approx([0, scores[1] - scores[0]], abs=1e-5)
    assert found["retention/worst"][-1] <= found["retention/delta/prose"][-1] < 0


def lowering() -> CapabilityRetention:
    return CapabilityRetention(["target"], lower_past=0.01, lower_to=0.5)


class Whole(NamedTuple):
    """A run that nothing interrupted, saved after every step."""

    folder: Path
    callback: CapabilityRetention
    weights: dict[str, Tensor]  # at the end


@pytest.fixture(scope="module")
def whole(deep_lab: Path, letters: str, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, callback = tmp_path_factory.mktemp("whole"), lowering()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(deep_lab)
        return Whole(folder, callback, fit(folder, letters, callback, save_every=1))


@pytest.mark.usefixtures("in_deep_lab")
@pytest.mark.parametrize(
    # Before a validation, between two, at the end of an epoch.
    "stop",
    [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)],
)
def test_a_resumed_run_retains_alike(stop: int, whole: Whole, letters: str, tmp_path: Path) -> None:
    fit(tmp_path, letters, lowering(), steps=stop, save_every=1)
    last = str(whole.folder / "checkpoints" / f"step={stop}.ckpt")
    second = lowering()
    resumed = fit(tmp_path, letters, second, save_every=1, resume=last)
    assert whole.callback.lowered
    assert second.state_dict() == whole.callback.state_dict()
    torch.testing.assert_close(resumed, whole.weights, atol=0, rtol=0)
    fronts = [folder / "pareto" for folder in (whole.folder, tmp_path)]
    one, other = (json.loads((front / "index.json").read_text()) for front in fronts)
    assert one == other
    kept = [sorted(file.name for file in front.iterdir()) for front in fronts]
    assert kept[0] == kept[1]


@pytest.mark.usefixtures("in_deep_lab")
def test_what_a_validation_wrote_before_its_checkpoint_is_there_once(
    letters: str, tmp_path: Path
) -> None:
    def watch() -> CapabilityRetention:
        return CapabilityRetention(["target"], keep_pareto=False)

    fit(tmp_path / "whole", letters, watch())
    fit(tmp_path / "cut", letters, watch(), steps=EVERY + 1, save_every=None)
    saved = str(tmp_path / "cut" / "checkpoints" / f"step={EVERY}.ckpt")
    fit(tmp_path / "cut", letters, watch(), save_every=None, resume=saved)
    for read in (tensors, scalars):
        found, expected = (read(tmp_path / name) for name in ("cut", "whole"))
        assert found == expected
    steps = [step for step, _ in tensors(tmp_path / "cut")["retention/text_summary"]]
    assert steps == list(range(0, STEPS + 1, EVERY))


PLANNED = [1e-2 * (1 / 3 + 2 / 3 * step / STEPS) for step in range(STEPS)]


def test_past_a_bound_the_rate_falls(whole: Whole) -> None:
    assert whole.callback.lowered
    rates = logged(whole.folder)["optim/learning_rate"]
    factors = [now / planned for now, planned in zip(rates, PLANNED, strict=True)]
    assert factors == pytest.approx([1.0] * EVERY + [0.5] * (STEPS - EVERY))


@pytest.mark.usefixtures("in_deep_lab")
def test_past_a_bound_the_run_ends(letters: str, tmp_path: Path) -> None:
    callback = CapabilityRetention(["target"], keep_pareto=False, stop_past=0.01)
    fit(tmp_path, letters, callback)
    assert not callback.lowered
    assert logged(tmp_path)["optim/learning_rate"] == pytest.approx(PLANNED[:EVERY])
    assert not (tmp_path / "pareto").exists()
