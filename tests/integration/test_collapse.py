"""Runs that collapse: noticed, undone and gone on with."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import CollapseWatch, EMATeacherUpdate
from callbacks.collapse_rules import Length
from callbacks.good_checkpoints import StepBack
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import CollapseError
from opd_lightning.methods import GRPO, OPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import Sampling
from opd_lightning.rules import TruncatedImportance
from opd_lightning.rules.base import Scored
from opd_lightning.teachers import EMATeacher, FrozenTeacher
from opd_lightning.types import Author, Prompt, RolloutBatch
from opd_lightning.verifiers import Verifier
from tests.integration.test_fit import fit, weights
from tests.integration.test_interrupted import PARTS, FailingTeacher, Losses, train
from tests.processes import run_ranks

TOKENS = 24


class PaysRepetition(Verifier):
    """Verifier with a wrong reward: the share of characters that repeat the previous one."""

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [sum(a == b for a, b in pairwise(r)) / TOKENS for r in responses]


@pytest.mark.slow  # rules, and how a run steps back, have quicker tests
@pytest.mark.usefixtures("in_deep_lab")
def test_paid_repetition_is_caught_and_undone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = GRPO(
        Student("lab/arithmetic/student"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2),
        max_logprob_gap=1e-4,  # the engine takes the weights that are back
    )
    watch = CollapseWatch("step_back", step_back=StepBack(every_n_steps=5, slow_down=0.02))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1000, save_top_k=0)
    logged = fit(
        method,
        steps=26,
        callbacks=[watch, saver],
        verifier=PaysRepetition(),
        sampling=Sampling(max_new_tokens=TOKENS),
        prompts_per_step=8,
        samples_per_prompt=4,
    ).logged
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "opd: step" in line]
    caught = int(line.split()[2].rstrip(":"))
    assert "Truncation: response/truncated is" in line
    assert "(1 of 3), the learning rate times 0.02 from here on" in line
    # The student began to repeat itself with the first step that paid for it.
    assert 3 < caught < 20
    before, after = logged[: caught + 1], logged[caught + 1 :]
    assert len(after) > 5
    assert before[-1]["response/truncated"] > 0.9
    assert mean(step["response/truncated"] for step in after) < 0.8
    assert all(step["reward"] < before[-1]["reward"] / 2 for step in after)
    assert all(step["entropy/student"] > 3.8 for step in after)
    rates = [step["optim/learning_rate"] for step in (before[-1], after[-1])]
    assert rates == pytest.approx([2e-2, 4e-4])


class Backwards(OPD):
    """Pushed away from its teacher."""

    def advantage(self, scored: Scored) -> torch.Tensor:
        return -scored.log_ratio


@pytest.mark.usefixtures("in_deep_lab")
def test_a_student_that_leaves_its_teacher_is_caught() -> None:
    """Whatever its responses look like: no other rule is on."""
    method = Backwards(
        Student("lab/arithmetic/student"),
        FrozenTeacher("lab/arithmetic/teacher"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )
    watch = CollapseWatch("stop", None, None, None, None)
    with pytest.raises(CollapseError, match="Disagreement: signal/log_ratio_abs_mean is") as told:
        fit(method, steps=20, callbacks=[watch], sampling=Sampling(max_new_tokens=8))
    assert 10 <= int(str(told.value).split()[1].rstrip(":")) <= 16


@pytest.mark.usefixtures("in_lab")
def test_steps_of_recorded_responses_do_not_count() -> None:
    """They log no lengths; those of the last sampled step are no figures of theirs."""
    steps, mix = 8, RolloutMix(recorded=0.5, whole_steps=True)
    sampled = [Author.STUDENT in mix.authors(0, step, 4, 1)[0] for step in range(steps)]
    assert not all(sampled[sampled.index(True) :])
    watch = watch_all("warn")
    fit(
        OPD(
            Student("lab/arithmetic/student"),
            FrozenTeacher("lab/arithmetic/teacher"),
            imitation=1.0,
        ),
        steps=steps,
        callbacks=[watch],
        train=PromptSource("lab/arithmetic/demonstrations.jsonl"),
        mix=mix,
    )
    (track,) = watch.tracks
    assert len(track.first) + track.outside == sum(sampled)


# Every response is too long, so it is known when a run steps back --------------------------

START, PATIENCE = 3, 2
STEPS = 8
BACK, GOOD = 5, 2  # optimiser steps made when it steps back, and of what it steps back to


def watch_all(action: Any = "step_back", at_most: int = 1) -> CollapseWatch:
    return CollapseWatch(
        action,
        truncation=None,
        repetition=None,
        entropy=None,
        length=Length(fall=None, highest=1.0, rise=None, patience=PATIENCE),
        disagreement=None,
        start_steps=START,
        step_back=StepBack(every_n_steps=1, at_most=at_most),
    )


class Look(Callback):
    """Looks at everything once the run has stepped back, before it goes on."""

    looked = False

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: RolloutBatch, *_: Any
    ) -> None:
        if trainer.global_step != BACK or self.looked:
            return
        self.looked = True
        folder = Path(trainer.checkpoint_callback.dirpath)
        assert [p.name for p in folder.iterdir()] == [f"good-step={GOOD}.ckpt"]
        good = torch.load(folder / f"good-step={GOOD}.ckpt", weights_only=True)
        exactly(pl_module.state_dict(), good["state_dict"])
        optimizer = trainer.optimizers[0]
        exactly(optimizer.state_dict()["state"], good["optimizer_states"][0]["state"])
        teacher = pl_module.asks()["teacher"].teacher
        exactly(teacher.state_dict(pl_module.student), good["ema_teachers"][0]["parameters"])
        # The clock was not put back: schedule, prompts, and the version of the weights.
        schedule = 1e-2 * (1 / 3 + 2 / 3 * BACK / STEPS)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule)
        assert pl_module.rate_scales == {"collapse": 0.1}
        assert batch.totals.step == BACK
        assert {rollout.policy_version for rollout in batch.rollouts} == {BACK}


def exactly(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_everything_goes_back_but_the_clock(staleness: int, tmp_path: Path) -> None:
    method = OPD(
        Student("lab/arithmetic/student"),
        EMATeacher(rate=0.5),
        rules=[TruncatedImportance()],
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=STEPS),
    )
    look = Look()
    # Whatever their order is: the watch comes after those that have a part in the step.
    callbacks = [watch_all(at_most=2), EMATeacherUpdate(), look]
    train(method, tmp_path, staleness, callbacks=callbacks)
    assert look.looked


def method(at: int = -1) -> OPD:
    return OPD(
        Student("lab/arithmetic/student"),
        FailingTeacher("lab/arithmetic/teacher", at),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=STEPS),
    )


def run(module: OPD, folder: Path, **more: Any) -> Losses:
    return train(module, folder, 0, steps=STEPS, callbacks=[watch_all(at_most=2)], **more)


@pytest.fixture(scope="module")
def whole(
    untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """The losses of a run that nothing happens to but the step back, and its weights."""
    module = method()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(untrained_lab)
        return run(module, tmp_path_factory.mktemp("whole")).of_step, weights(module)


@pytest.mark.slow
@pytest.mark.usefixtures("in_lab")
def test_only_the_good_checkpoint_contains_the_first_step(tmp_path: Path, whole: Any) -> None:
    with pytest.raises(ConnectionError):
        run(method(2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["good-step=0.ckpt"]
    assert run(method(), tmp_path, ckpt_path="last").of_step == whole[0]


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(
    # One step out of its band already, and after it has stepped back.
    "step",
    [BACK - 1, pytest.param(BACK + 1, marks=pytest.mark.slow)],
)
def test_a_run_that_steps_back_is_resumed_bit_for_bit(
    step: int, tmp_path: Path, whole: Any
) -> None:
    expected, final = whole
    with pytest.raises(ConnectionError):
        run(method(PARTS * step + 2), tmp_path)
    resumed = method()
    seen = run(resumed, tmp_path, ckpt_path=str(tmp_path / "last.ckpt")).of_step
    # The step before is what callbacks can still see when the first micro-batch ends.
    assert seen == {n: loss for n, loss in expected.items() if n >= step - 1}
    exactly(weights(resumed), final)


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(
    ("action", "step", "told"),
    [
        ("stop", 4, "resume from a checkpoint before step 3, and lower"),
        ("step_back", 6, "the run ends after 1 step-back: lower"),
    ],
)
def test_a_run_ends_where_it_is_told_to(action: str, step: int, told: str, tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match=f"step {step}: Length: response/length is .*{told}"):
        train(method(), tmp_path, 0, steps=STEPS, callbacks=[watch_all(action)])


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("file", marks=pytest.mark.slow),
        pytest.param("folder", marks=pytest.mark.slow),
    ],
)
def test_ranks_step_back_together(how: str, untrained_lab: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.pt"
        run_ranks(
            "tests.integration.collapse_ranks",
            *(str(ranks), how, str(file)),
            count=ranks,
            cwd=untrained_lab,
            timeout=300,
        )
        found.append(torch.load(file, weights_only=True))
    one, two = found
    assert one["step_backs"] == two["step_backs"] == 1
    torch.testing.assert_close(two["weights"], one["weights"], atol=1e-5, rtol=0)
    for weights_of_rank in two["of_ranks"]:
        exactly(weights_of_rank, two["weights"])
