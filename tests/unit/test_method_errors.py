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
    line = fail(f"--model={METHODS}GRPO", "--data.samples_per_prompt=2", "--data.verifier=null")
    assert "data.verifier: got nothing, but GRPO reads rewards" in line


def test_extrapolation_needs_a_reference(fail: Fail) -> None:  # noqa: F811
    assert "reference: got nothing for scale 1.25" in fail(f"--model={METHODS}GOPD")


def test_a_rule_must_get_the_scores_it_reads(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model.init_args.rules+={RULES}EvidenceMask")
    assert "EvidenceMask reads the scores called 'plain', but OPD asks for teacher" in line


def test_a_divergence_has_no_advantage_to_change(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model={METHODS}DivergenceOPD", f"--model.init_args.rules+={RULES}HardClip")
    assert "HardClip changes the advantage, but DivergenceOPD's loss is a divergence" in line


def test_an_ema_teacher_must_be_moved(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model.init_args.teacher={TEACHERS}EMATeacher")
    assert "trainer.callbacks: nothing moves OPD's EMATeacher (rate 0.01)" in line


def test_demonstrations_must_be_meant(fail: Fail) -> None:  # noqa: F811
    assert "data.teacher: got nothing for mix.teacher 0.5" in fail("--data.mix.teacher=0.5")
    assert "which OPD takes for its own" in fail("--data.mix.add_recorded=true")


def test_the_sampler_is_told_what_the_teacher_is_told(fail: Fail) -> None:  # noqa: F811
    line = fail(
        f"--model={METHODS}OPSDK1",
        "--model.init_args.view=other",
        "--data.mix.guided=0.5",
        '--data.views={"other": {"template": "x"}}',
    )
    assert "data.mix.guided_view: got 'privileged', expected other: the sampler" in line


def test_supervised_training_needs_something_to_imitate(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model={METHODS}SFT")
    assert "data.mix: got the student's own responses, but SFT learns from given ones alone" in line


def test_the_engine_is_not_corrected_for_twice(fail: Fail) -> None:  # noqa: F811
    line = fail(
        f"--model.init_args.rules+={RULES}TruncatedImportance",
        "--model.init_args.surrogate.ratio_to=sampler",
    )
    assert "surrogate.ratio_to: got 'sampler'" in line


def test_stale_rollouts_are_corrected_or_refused(fail: Fail) -> None:  # noqa: F811
    assert "data.max_staleness" in fail("--data.max_staleness=2")
    stale = "--data.max_staleness=1"
    assert "data.max_staleness: got 1, but OPD takes every rollout for the newest" in fail(stale)
    assert "but GOPD takes" in fail(
        stale,
        f"--model={METHODS}GOPD",
        "--model.init_args.scale=1",
        "--model.init_args.importance_cap=null",
    )
    # These go on to the next mistake.
    missing = "--data.train.path=nowhere.jsonl"
    for method in (
        [f"--model.init_args.rules+={RULES}TruncatedImportance"],
        [f"--model.init_args.rules+={RULES}IcePop"],
        ["--model.init_args.surrogate.ratio_to=sampler"],
        [f"--model={METHODS}DivergenceOPD"],
        [f"--model={METHODS}GOPD", "--model.init_args.scale=1"],
    ):
        assert "nowhere.jsonl" in fail(stale, missing, *method)


def test_who_sleeps_cannot_write_ahead(fail: Fail) -> None:  # noqa: F811
    line = fail(
        "--data.max_staleness=1",
        "--data.engine=opd_lightning.rollouts.VLLMEngine",
        "--data.engine.init_args.sleep_while_training=true",
    )
    assert "data.max_staleness: got 1, so the engine writes while the trainer works" in line


def test_a_demonstrator_does_not_sleep(fail: Fail) -> None:  # noqa: F811
    engine = (
        "{class_path: opd_lightning.rollouts.VLLMEngine, init_args: {sleep_while_training: true}}"
    )
    line = fail(
        "--data.mix.teacher=0.5",
        "--model.init_args.imitation=1.0",
        f"--data.teacher={{path: lab/arithmetic/teacher, engine: {engine}}}",
    )
    assert "data.teacher.engine: sleep_while_training is on" in line


def test_terms_have_names_of_their_own(fail: Fail) -> None:  # noqa: F811
    bonus = f"--model.init_args.terms+={RULES}EntropyBonus"
    assert "terms: two are called 'entropy_bonus'" in fail(bonus, bonus)


def test_a_term_takes_no_name_that_is_taken(fail: Fail) -> None:  # noqa: F811
    region = f"--model.init_args.terms+={RULES}TrustRegion"
    frozen = f"--model.init_args.terms.init_args.reference={TEACHERS}FrozenTeacher"
    path = "--model.init_args.terms.init_args.reference.init_args.path=lab/arithmetic/student"
    line = fail(region, frozen, path, "--model.init_args.terms.init_args.name=teacher")
    assert "terms: TrustRegion: the name 'teacher' is taken" in line


@pytest.mark.parametrize("rule", ["StabilityWeight", "PositionWeight", "TrajectoryGate"])
def test_rules_say_that_they_read_the_teacher(fail: Fail, rule: str) -> None:  # noqa: F811
    line = fail(
        f"--model={METHODS}GRPO",
        "--data.samples_per_prompt=2",
        f"--model.init_args.rules+={RULES}{rule}",
    )
    assert f"{rule} reads the scores called 'teacher', but GRPO asks for none" in line


def test_a_baseline_needs_somebody_s_distribution(fail: Fail) -> None:  # noqa: F811
    line = fail(
        f"--model={METHODS}GRPO",
        "--data.samples_per_prompt=2",
        f"--model.init_args.rules+={RULES}VocabularyBaseline",
    )
    assert "baseline compares with the distribution of 'teacher', but GRPO asks for none" in line


def test_a_divergence_has_no_ratio_to_clip(fail: Fail) -> None:  # noqa: F811
    line = fail(f"--model={METHODS}DivergenceOPD", "--model.init_args.surrogate.clip_low=0.2")
    assert "surrogate: got Surrogate(" in line


def test_views_that_nobody_reads_are_named(fail: Fail) -> None:  # noqa: F811
    line = fail('--data.views={"priviledged": {"template": "x"}}')
    assert "data.views: got 'priviledged', which OPD does not read" in line


def test_a_share_of_no_prompt_is_refused(fail: Fail) -> None:  # noqa: F811
    line = fail(
        "--model.init_args.imitation=0.1",
        "--data.mix.recorded=0.1",
        "--data.prompts_per_step=4",
    )
    assert "data.mix.recorded: got 0.1, which is less than half a prompt" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--data.mix.guided=1.5", "mix.guided: got 1.5"),
        ("--data.mix.only_correct=true", "mix.only_correct: got true"),
        ("--model.init_args.discount=5", "discount: got 5.0, expected a number in [0, 1]"),
        ("--model.init_args.surrogate.dual_clip=0.5", "dual_clip is 0.5"),
    ],
)
def test_knobs_are_checked(fail: Fail, change: str, said: str) -> None:  # noqa: F811
    assert said in fail(change)
