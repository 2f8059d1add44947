"""A method that cannot have what it reads is refused in one line, before weights load."""

from collections.abc import Callable
from typing import Any

import pytest

from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.views import PromptView
from opd_lightning.errors import UserError
from opd_lightning.losses.surrogate import Surrogate
from opd_lightning.methods import EDGEOPD, OPSD, SFT, LightningOPD
from opd_lightning.models.student import Student
from opd_lightning.rollouts import VLLMEngine
from opd_lightning.rules import (
    CompetenceWeight,
    EntropyBonus,
    EvidenceMask,
    GroupGate,
    HardClip,
    IcePop,
    PositionWeight,
    StabilityWeight,
    TrajectoryGate,
    TruncatedImportance,
    TrustRegion,
    VocabularyBaseline,
)
from opd_lightning.rules.base import Rule
from opd_lightning.teachers import EMATeacher, FrozenTeacher
from tests.refusals import (
    STUDENT,
    TEACHER,
    Build,
    Refusal,
    divergence,
    gopd,
    grpo,
    opd,
    opsd,
)

PAIRS = {"samples_per_prompt": 2}


def edge(**more: Any) -> EDGEOPD:
    return EDGEOPD(Student(STUDENT), FrozenTeacher(TEACHER), **more)


def test_entropy_needs_a_teacher() -> None:
    class Unsure(EntropyBonus):
        reads_entropy = True

    with pytest.raises(UserError, match="Unsure reads the teacher's entropy, but GRPO has no"):
        grpo(terms=[Unsure()]).check()


def test_views_must_exist(refusal: Refusal) -> None:
    line = refusal(lambda: opsd(view="secret"))
    assert "data.views: got privileged, but OPSDK1 reads the view 'secret'" in line


def test_what_late_views_read_must_come_from_somewhere(refusal: Refusal) -> None:
    for template in ("{{ attempt }} {{ reward }}", "{{ peer_failure }}"):
        views = {"late": PromptView(template=template)}
        line = refusal(lambda: opsd(view="late"), views=views, verifier=None, **PAIRS)
        assert line.startswith("data.verifier: got nothing, but the view 'late'")
    line = refusal(lambda: opsd(view="late"), views=views)
    assert line.startswith("data.samples_per_prompt: got 1, but the view 'late'")


def test_privileged_text_must_be_there(refusal: Refusal) -> None:
    assert "train.jsonl:1: no 'privileged', which a view's template reads" in refusal(opsd)


def test_guided_rollouts_need_it_too(refusal: Refusal) -> None:
    assert "no 'privileged'" in refusal(mix=RolloutMix(guided=0.5))


def test_groups_need_company(refusal: Refusal) -> None:
    assert "data.samples_per_prompt: got 1, but GRPO compares" in refusal(grpo)


def test_rewards_need_a_verifier(refusal: Refusal) -> None:
    line = refusal(grpo, verifier=None, **PAIRS)
    assert "data.verifier: got nothing, but GRPO reads rewards" in line


def test_extrapolation_needs_a_reference(refusal: Refusal) -> None:
    assert "reference: got nothing for scale 1.25" in refusal(gopd)


def test_a_rule_must_get_the_scores_it_reads(refusal: Refusal) -> None:
    line = refusal(lambda: opd(rules=[EvidenceMask()]))
    assert "EvidenceMask reads the scores called 'plain', but OPD asks for teacher" in line


def test_a_divergence_has_no_advantage_to_change(refusal: Refusal) -> None:
    line = refusal(lambda: divergence(rules=[HardClip()]))
    assert "HardClip changes the advantage, but DivergenceOPD's loss is a divergence" in line


def test_an_ema_teacher_must_be_moved(refusal: Refusal) -> None:
    line = refusal(lambda: opd(teacher=EMATeacher()))
    assert "trainer.callbacks: nothing updates OPD's EMATeacher (rate 0.01)" in line


def test_demonstrations_must_be_meant(refusal: Refusal) -> None:
    mix = RolloutMix(teacher=0.5)
    assert "data.teacher: got nothing for mix.teacher 0.5" in refusal(mix=mix)
    assert "which OPD takes for its own" in refusal(mix=RolloutMix(add_recorded=True))


def test_the_sampler_is_told_what_the_teacher_is_told(refusal: Refusal) -> None:
    views = {"other": PromptView(template="x")}
    line = refusal(lambda: opsd(view="other"), mix=RolloutMix(guided=0.5), views=views)
    assert "data.mix.guided_view: got 'privileged', expected other: the sampler" in line


def test_supervised_training_needs_something_to_imitate(refusal: Refusal) -> None:
    line = refusal(lambda: SFT(Student(STUDENT)))
    assert "data.mix: got the student's own responses, but SFT learns from given ones alone" in line


def test_the_engine_is_not_corrected_for_twice(refusal: Refusal) -> None:
    surrogate = Surrogate(ratio_to="sampler")
    line = refusal(lambda: opd(rules=[TruncatedImportance()], surrogate=surrogate))
    assert "surrogate.ratio_to: got 'sampler'" in line


@pytest.mark.parametrize(
    ("build", "name"), [(opd, "OPD"), (lambda: gopd(scale=1.0, importance_cap=None), "GOPD")]
)
def test_stale_rollouts_are_refused(refusal: Refusal, build: Build, name: str) -> None:
    line = refusal(build, max_staleness=1)
    assert f"data.max_staleness: got 1, but {name} takes every rollout for the newest" in line


@pytest.mark.parametrize(
    "build",
    [
        lambda: opd(rules=[TruncatedImportance()]),
        lambda: opd(rules=[IcePop()]),
        lambda: opd(surrogate=Surrogate(ratio_to="sampler")),
        divergence,
        lambda: gopd(scale=1.0),
    ],
)
def test_or_corrected(refusal: Refusal, build: Build) -> None:
    """These go on to the next mistake."""
    assert "nowhere.jsonl" in refusal(build, max_staleness=1, path="nowhere.jsonl")


def test_who_sleeps_cannot_write_ahead(refusal: Refusal) -> None:
    line = refusal(max_staleness=1, engine=VLLMEngine(sleep_while_training=True))
    assert "data.max_staleness: got 1, so the engine writes while the trainer works" in line


def test_a_demonstrator_does_not_sleep(refusal: Refusal) -> None:
    teacher = TeacherSampler(path=TEACHER, engine=VLLMEngine(sleep_while_training=True))
    line = refusal(lambda: opd(imitation=1.0), mix=RolloutMix(teacher=0.5), teacher=teacher)
    assert "data.teacher.engine: sleep_while_training is on" in line


def test_terms_have_names_of_their_own(refusal: Refusal) -> None:
    line = refusal(lambda: opd(terms=[EntropyBonus(), EntropyBonus()]))
    assert "terms: two are called 'entropy_bonus'" in line


def test_a_term_takes_no_name_that_is_taken(refusal: Refusal) -> None:
    line = refusal(lambda: opd(terms=[TrustRegion(FrozenTeacher(STUDENT), name="teacher")]))
    assert "terms: TrustRegion: the name 'teacher' is taken" in line


@pytest.mark.parametrize("name", ["loss", "kept_mass", "student"])
def test_nor_one_that_the_training_step_uses(refusal: Refusal, name: str) -> None:
    """It would replace the policy gradient, be overwritten or raise in the first step."""
    term = TrustRegion(FrozenTeacher(STUDENT), estimator="full", name=name)
    line = refusal(lambda: opd(terms=[term]))
    assert f"terms: TrustRegion: the name {name!r} is taken; give it another name" in line


def test_what_the_student_does_not_write_is_not_compared_in_groups(refusal: Refusal) -> None:
    given, student = {"mix": RolloutMix(recorded=1), **PAIRS}, Student(STUDENT)
    said = "data.mix: got given responses alone, but"
    builds: dict[str, Build] = {
        "LightningOPD": lambda: LightningOPD(student, FrozenTeacher(TEACHER), rules=[GroupGate()]),
        "SFT": lambda: SFT(student, rules=[CompetenceWeight()]),
        "DivergenceOPD": lambda: divergence(rules=[TrajectoryGate()]),
    }
    for name, build in builds.items():
        assert refusal(build, **given).startswith(f"{said} {name} or one of its rules compares")
    views = {"privileged": PromptView(template="{{ peer }}")}
    line = refusal(lambda: OPSD(student, FrozenTeacher(TEACHER)), views=views, **given)
    assert line.startswith(f"{said} the view 'privileged' reads 'peer'")


@pytest.mark.parametrize("rule", [StabilityWeight(), PositionWeight(), TrajectoryGate()])
def test_rules_say_that_they_read_the_teacher(refusal: Refusal, rule: Rule) -> None:
    line = refusal(lambda: grpo(rules=[rule]), **PAIRS)
    name = type(rule).__name__
    assert f"{name} reads the scores called 'teacher', but GRPO asks for none" in line


def test_a_baseline_needs_somebody_s_distribution(refusal: Refusal) -> None:
    line = refusal(lambda: grpo(rules=[VocabularyBaseline()]), **PAIRS)
    assert "baseline compares with the distribution of 'teacher', but GRPO asks for none" in line


def test_a_divergence_has_no_ratio_to_clip(refusal: Refusal) -> None:
    line = refusal(lambda: divergence(surrogate=Surrogate(clip_low=0.2)))
    assert "surrogate: got Surrogate(" in line


def test_views_that_nobody_reads_are_named(refusal: Refusal) -> None:
    line = refusal(views={"priviledged": PromptView(template="x")})
    assert "data.views: got 'priviledged', which OPD does not read" in line


def test_a_share_of_no_prompt_is_refused(refusal: Refusal) -> None:
    line = refusal(lambda: opd(imitation=0.1), mix=RolloutMix(recorded=0.1))
    assert "data.mix.recorded: got 0.1, which is less than half a prompt" in line


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RolloutMix(guided=1.5), "mix.guided: got 1.5"),
        (lambda: RolloutMix(only_correct=True), "mix.only_correct: got true"),
        (lambda: opd(discount=5.0), "discount: got 5.0, expected a number in [0, 1]"),
        (lambda: edge(clip=-1.0), "clip: got -1.0, expected at least 0 (nats)"),
        (
            lambda: edge(evidence="soft", region="negative"),
            "region: got 'negative' with evidence 'soft' and anchor 0.05, expected it with "
            "evidence 'mask' only; leave it out",
        ),
        (lambda: edge(evidence="none", threshold=0.5), "threshold: got 0.5 with evidence 'none'"),
        (lambda: edge(region="near-zero", threshold=0.5), "EvidenceMask: threshold is 0.5"),
        (lambda: edge(epsilon=0.1), "epsilon: got 0.1 with evidence 'mask'"),
        (
            lambda: edge(anchor=0, estimator="k2"),
            "estimator: got 'k2' with evidence 'mask' and anchor 0, expected it with an anchor",
        ),
        (lambda: Surrogate(dual_clip=0.5), "dual_clip is 0.5"),
    ],
)
def test_knobs_are_checked(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value)
