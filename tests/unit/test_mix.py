"""Authors of responses: shares, determinism, and use of their rollouts."""

from collections import Counter

import pytest

from opd_lightning.data.mix import RolloutMix
from opd_lightning.errors import UserError
from opd_lightning.types import Author


def counts(
    mix: RolloutMix, steps: int = 200, prompts: int = 16, samples: int = 4
) -> Counter[Author]:
    return Counter(
        author
        for step in range(steps)
        for written in mix.authors(7, step, prompts, samples)
        for author in written
    )


def test_the_default_is_the_student_alone() -> None:
    assert RolloutMix().authors(0, 3, 2, 3) == [[Author.STUDENT] * 3] * 2


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 1.0])
def test_u11_guided_share_is_a_fair_coin_per_rollout(share: float) -> None:
    found = counts(RolloutMix(guided=share))
    total = found.total()
    error = 4 * (share * (1 - share) / total) ** 0.5
    assert abs(found[Author.GUIDED] / total - share) <= error
    assert found[Author.GUIDED] + found[Author.STUDENT] == total


def test_u11_choices_depend_on_coordinates_alone() -> None:
    mix = RolloutMix(guided=0.5, teacher=0.25)
    assert mix.authors(1, 5, 8, 2) == mix.authors(1, 5, 8, 2)
    assert mix.authors(1, 5, 8, 2) != mix.authors(1, 6, 8, 2)
    assert mix.authors(1, 5, 8, 2) != mix.authors(2, 5, 8, 2)


def test_teacher_and_recorded_shares_are_exact_each_step() -> None:
    mix = RolloutMix(teacher=0.125, recorded=0.25)
    taken = set()
    for step in range(50):
        authors = [written[0] for written in mix.authors(0, step, 16, 4)]
        assert Counter(authors) == {Author.TEACHER: 2, Author.RECORDED: 4, Author.STUDENT: 10}
        taken |= {i for i, author in enumerate(authors) if author is Author.TEACHER}
    assert taken == set(range(16))  # not always the same prompts
    assert all(len(w) == (4 if w[0] is Author.STUDENT else 1) for w in mix.authors(0, 0, 16, 4))
    several = {w[0]: len(w) for w in mix.authors(0, 0, 16, 4, 3)}
    assert several[Author.TEACHER] == 3


def test_whole_steps_toss_one_coin() -> None:
    mix = RolloutMix(recorded=0.5, whole_steps=True)
    steps = [{a for w in mix.authors(3, step, 8, 2) for a in w} for step in range(400)]
    assert all(len(authors) == 1 for authors in steps)
    recorded = sum(authors == {Author.RECORDED} for authors in steps)
    assert abs(recorded - 200) <= 40  # 4 standard deviations


def test_added_records_come_once_per_prompt() -> None:
    for written in RolloutMix(add_recorded=True, recorded=0.5).authors(0, 0, 8, 3):
        assert written.count(Author.RECORDED) == 1
        assert len(written) in (1, 4)
    # Of the teacher's prompts too, in steps of records and in others.
    mix = RolloutMix(add_recorded=True, teacher=0.5, recorded=0.5, whole_steps=True)
    steps = [mix.authors(0, step, 8, 3) for step in range(20)]
    assert all(written.count(Author.RECORDED) == 1 for step in steps for written in step)
    assert len({max(map(len, step)) for step in steps}) == 2


@pytest.mark.parametrize("shares", [{"guided": 1.1}, {"teacher": -0.1}])
def test_shares_are_checked(shares: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"expected a share in \[0, 1\]"):
        RolloutMix(**shares)  # type: ignore[arg-type]


def test_shares_of_prompts_must_fit() -> None:
    with pytest.raises(UserError, match="at most 1"):
        RolloutMix(teacher=0.7, recorded=0.7)


@pytest.mark.parametrize("prompts", [3, 4, 5])
def test_shares_that_add_up_to_one_leave_nothing(prompts: int) -> None:
    mix = RolloutMix(teacher=0.5, recorded=0.5)
    assert not mix.samples
    for step in range(20):
        authors = {author for written in mix.authors(0, step, prompts, 2) for author in written}
        assert Author.STUDENT not in authors


def test_who_samples_is_known_in_advance() -> None:
    assert RolloutMix(recorded=0.5, teacher=0.5, whole_steps=True).samples
    assert not RolloutMix(recorded=1.0, whole_steps=True).samples
    assert not RolloutMix(teacher=1.0).samples
