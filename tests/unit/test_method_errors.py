"""A method that cannot have what it reads is refused in one line, before weights load."""

import pytest

from tests.unit.test_cli_errors import Fail, fail  # noqa: F401 - a fixture

METHODS = "opd_lightning.methods."
TEACHERS = "opd_lightning.teachers."
RULES = "opd_lightning.rules."


def test_views_must_exist(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model={METHODS}OPSDK1", "--model.init_args.view=secret")
    assert "data.views: got privileged, but OPSDK1 reads the view 'secret'" in line


def test_privileged_text_must_be_there(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model={METHODS}OPSDK1")
    assert "train.jsonl:1: no 'privileged', which a view's template reads" in line


def test_guided_rollouts_need_it_too(fail: Fail) -> None:  # noqa: F811
    assert "no 'privileged'" in fail("--data.mix.guided=0.5")


def test_groups_need_company(fail: Fail) -> None:  # noqa: F811
    assert "data.samples_per_prompt: got 1, but GRPO compares" in fail(f"--model={METHODS}GRPO")


def test_rewards_need_a_verifier(fail: Fail) -> None:  # noqa: F811
    line = fail(
        f"--model={METHODS}GRPO", "--data.samples_per_prompt=2", "--data.verifier=null"
    )
    assert "data.verifier: got nothing, but GRPO reads rewards" in line


def test_extrapolation_needs_a_reference(fail: Fail) -> None:  # noqa: F811
    assert "reference: got nothing for scale 1.25" in fail(f"--model={METHODS}GOPD")


def test_a_rule_must_get_the_scores_it_reads(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model.init_args.rules+={RULES}EvidenceMask")
    assert "EvidenceMask reads the scores called 'plain', but OPD asks for teacher" in line


def test_a_divergence_has_no_advantage_to_change(fail: Fail) -> None:  # noqa: F811
    line = fail(
        f"--model={METHODS}DivergenceOPD", f"--model.init_args.rules+={RULES}HardClip"
    )
    assert "HardClip changes the advantage, but DivergenceOPD's loss is a divergence" in line


def test_an_ema_teacher_must_be_moved(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model.init_args.teacher={TEACHERS}EMATeacher")
    assert "trainer.callbacks: nothing moves OPD's EMATeacher (rate 0.01)" in line


def test_demonstrations_must_be_meant(fail: Fail) -> None:  # noqa: F811
    assert "data.teacher: got nothing for mix.teacher 0.5" in fail("--data.mix.teacher=0.5")
    assert "which OPD takes for its own" in fail("--data.mix.add_recorded=true")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--data.mix.guided=1.5", "mix.guided: got 1.5"),
        ("--model.init_args.surrogate.dual_clip=0.5", "dual_clip is 0.5"),
    ],
)
def test_knobs_are_checked(fail: Fail, change: str, said: str) -> None:  # noqa: F811
    assert said in fail(change)
