"""Step metrics against hand-made fixtures (U23), and exact over micro-batches."""

import math
import random
import string
from dataclasses import replace
from itertools import combinations
from math import exp, log

import numpy as np
import pytest
import torch

from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import Loaded
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.evaluation.scores import SuiteScores, likelihoods_of
from opd_lightning.evaluation.statistics import interval, wilson
from opd_lightning.losses.advantage import group_advantage
from opd_lightning.metrics.depth import DepthStatistics
from opd_lightning.metrics.overlap import OverlapStatistics
from opd_lightning.metrics.repetition import is_repetitive, repeated_trigrams
from opd_lightning.metrics.signal import SignalStatistics
from opd_lightning.metrics.step import EngineStatistics, ResponseStatistics
from opd_lightning.metrics.sums import Means
from opd_lightning.metrics.teachers import TeacherStatistics
from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Rollout, TokenScores
from tests.batches import make_batch, make_rollout


def scores(logprobs: list[list[float]], entropy: float, top: list[int]) -> TokenScores:
    values = torch.tensor(logprobs)
    return TokenScores(
        logprobs=values,
        entropy=torch.full(values.shape, entropy),
        top_ids=torch.tensor(top).expand(*values.shape, len(top)),
        top_logprobs=torch.full((*values.shape, len(top)), -1.5),
    )


def test_signal_by_hand() -> None:
    batch = make_batch(
        [
            make_rollout([5, 6], reward=1.0, group_mean=0.5, group_std=0.5),
            make_rollout([5], reward=0.0, group_mean=0.5, group_std=0.5),
        ]
    )
    student = scores([[-1.0, -2.0], [-1.0, 0.0]], entropy=0.5, top=[1, 2, 3, 4])
    teacher = scores([[-0.5, -5.0], [-3.0, 0.0]], entropy=0.2, top=[4, 9, 1, 8])
    metric = SignalStatistics()
    metric.update(batch, student, teacher, batch.response_mask)
    got = {k: v.item() for k, v in metric.compute().items()}
    # d = +0.5, -3, -2; the first rollout did better than its group, the second worse.
    assert got["signal/log_ratio_mean"] == pytest.approx(-1.5)
    assert got["signal/log_ratio_abs_mean"] == pytest.approx(5.5 / 3)
    assert got["signal/positive"] == pytest.approx(1 / 3)
    assert got["signal/log_ratio_q01"] == pytest.approx(-2.98)
    assert got["signal/log_ratio_q99"] == pytest.approx(0.45)
    assert got["signal/log_ratio_q05"] == pytest.approx(-2.9)
    assert got["signal/log_ratio_q95"] == pytest.approx(0.25)
    assert got["entropy/student"] == pytest.approx(0.5)
    assert got["entropy/teacher"] == pytest.approx(0.2)
    assert got["entropy/gap"] == pytest.approx(0.3)
    assert got["signal/agree_with_reward"] == pytest.approx(2 / 3)
    assert got["signal/disagree_with_reward"] == pytest.approx(1 / 3)
    alone = make_batch([make_rollout([5, 6], group_mean=float("nan"))])  # no reward to agree with
    one, other = (replace(x, logprobs=x.logprobs[:1], entropy=x.entropy[:1], top_ids=x.top_ids[:1])
                  for x in (student, teacher))  # fmt: skip
    metric.update(alone, one, other, alone.response_mask)
    assert metric.compute()["signal/agree_with_reward"].item() == pytest.approx(2 / 3)


def test_entropies_are_means_over_the_tokens_where_they_are_known() -> None:
    """A teacher on a server, of one domain of two, does not report its entropy."""
    batch = make_batch([make_rollout([5, 6]), make_rollout([5])])
    student = scores([[-1.0, -2.0], [-1.0, 0.0]], entropy=0.5, top=[])
    known = torch.tensor([[torch.nan, torch.nan], [2.0, torch.nan]])
    metric = SignalStatistics()
    metric.update(batch, student, replace(student, entropy=known), batch.response_mask)
    got = {name: value.item() for name, value in metric.compute().items()}
    assert got["entropy/student"] == 0.5
    assert (got["entropy/teacher"], got["entropy/gap"]) == (2.0, 1.5)
    assert got["signal/positive"] == 0  # all d are 0


def test_tokens_per_group_of_a_teacher_with_other_tokens() -> None:
    batch = make_batch([make_rollout([5, 6]), make_rollout([5])])
    student = scores([[-1.0, -2.0], [-1.0, 0.0]], entropy=0.5, top=[1])
    metric = SignalStatistics()
    ends = torch.tensor([[False, True], [True, False]])
    metric.update(batch, student, replace(student, ends=ends), batch.response_mask)
    assert metric.compute()["signal/group_length"].item() == 1.5
    assert metric.compute()["signal/merged_groups"].item() == 0.5
    metric.reset()
    # The teacher has several tokens where the student has one.
    theirs = replace(student, ends=ends, group_tokens=torch.tensor([[0, 1], [2, 0]]))
    metric.update(batch, student, theirs, batch.response_mask)
    assert metric.compute()["signal/merged_groups"].item() == 1
    metric.reset()
    metric.update(batch, student, student, batch.response_mask)
    assert "signal/group_length" not in metric.compute()


def overlap(student: dict[int, float], teacher: dict[int, float]) -> dict[str, float]:
    """Figures of one token whose likeliest tokens have these probabilities."""

    def told(model: dict[int, float]) -> TokenScores:
        one = torch.zeros(1, 1)
        ids = torch.tensor([[list(model)]])
        logprobs = torch.tensor([[list(model.values())]], dtype=torch.float64).log().float()
        return TokenScores(logprobs=one, entropy=one, top_ids=ids, top_logprobs=logprobs)

    metric = OverlapStatistics()
    metric.update(told(student), told(teacher), torch.ones(1, 1, dtype=torch.bool))
    return {name.removeprefix("overlap/"): x.item() for name, x in metric.compute().items()}


def test_u23_overlap_by_hand() -> None:
    # Shared: 1 and 3, of which the student has 0.5 and 0.1, the teacher 0.2 and 0.4.
    got = overlap({1: 0.5, 2: 0.3, 3: 0.1}, {4: 0.3, 3: 0.4, 1: 0.2})
    assert got["ratio"] == pytest.approx(2 / 3)
    assert got["student_mass"] == pytest.approx(0.6)
    assert got["teacher_mass"] == pytest.approx(0.6)
    kl = 5 / 6 * log((5 / 6) / (1 / 3)) + 1 / 6 * log((1 / 6) / (2 / 3))
    assert got["advantage"] == pytest.approx(-kl / 2)
    weighted = 0.2 * log(0.5 / 0.2) + 0.4 * log(0.1 / 0.4)
    assert got["teacher_weighted"] == pytest.approx(weighted / 2)


def test_u23_identical_and_disjoint_supports() -> None:
    model = {1: 0.6, 2: 0.3}
    masses = {"student_mass": pytest.approx(0.9), "teacher_mass": pytest.approx(0.9)}
    assert overlap(model, model) == {"ratio": 1, "advantage": 0, "teacher_weighted": 0, **masses}
    none = {"ratio": 0, "student_mass": 0, "teacher_mass": 0}  # and no advantage, rather than NaN
    assert overlap(model, {3: 0.6, 4: 0.3}) == none
    one = {1: 0.6, 2: 0.0}  # log-probs that a server returned for its top 2
    assert overlap(model, one)["ratio"] == 0.5
    assert overlap(model, one)["advantage"] == 0  # all of what they share


def test_overlap_of_what_both_think_all_but_impossible() -> None:
    """Their probabilities are 0 in float32; renormalised on what is shared they are not."""
    student = {1: 1.0, 2: exp(-200), 3: exp(-201)}
    teacher = {4: 1.0, 3: exp(-300), 2: exp(-302)}
    got = overlap(student, teacher)
    first, second = 1 / (1 + exp(-1)), 1 / (1 + exp(-2))
    expected = first * log((1 - second) / first) + (1 - first) * log(second / (1 - first))
    assert got["advantage"] == pytest.approx(expected / 2, rel=1e-4)
    assert got["student_mass"] == got["teacher_mass"] == got["teacher_weighted"] == 0


def test_a_teacher_that_ranks_nothing_has_no_overlap() -> None:
    batch = make_batch([make_rollout([5, 6])])
    student, teacher = scores([[-1, -1]], 1.0, [1, 2]), scores([[-1, -1]], 1.0, [])
    metric = OverlapStatistics()
    metric.update(student, teacher, batch.response_mask)
    assert metric.compute() == {}


def test_the_signal_by_depth() -> None:
    batch = make_batch([make_rollout([5] * 7), make_rollout([5] * 20)])
    metric = DepthStatistics()
    metric.limit = 20
    ratio = torch.arange(20.0).expand(2, 20) * torch.tensor([[-1.0], [1.0]])
    student = scores(torch.zeros(2, 20).tolist(), 0.0, [])
    metric.update(student, scores(ratio.tolist(), 0.0, []), batch.response_mask)
    got = {name: x.item() for name, x in metric.compute().items()}
    assert got["depth_log_ratio/0"] == 0  # positions 0 and 1, with both signs
    assert got["depth_log_ratio_abs/0"] == 0.5
    assert got["depth_log_ratio/3"] == pytest.approx((6 + 7 - 6) / 3)  # the short one ends in it
    assert got["depth_log_ratio_abs/3"] == pytest.approx((6 + 7 + 6) / 3)
    assert got["depth_log_ratio/9"] == 18.5
    metric.reset()
    metric.limit = 10  # shorter than what others wrote
    metric.update(student, scores(ratio.tolist(), 0.0, []), batch.response_mask)
    assert metric.compute()["depth_log_ratio/9"] == sum(range(9, 20)) / 11
    metric.reset()
    metric.limit = 20
    metric.update(student, student, batch.response_mask & (torch.arange(20) < 4))
    assert sorted(metric.compute()) == [
        f"depth_log_ratio{kind}/{decile}" for kind in ("", "_abs") for decile in (0, 1)
    ]


def test_responses_by_hand_and_over_micro_batches() -> None:
    nan = float("nan")
    rows = [
        make_rollout([5, 6, 2], reward=1.0, group_mean=1.0, group_std=0.0),
        make_rollout([5] * 5, reward=0.0, group_mean=0.5, group_std=0.5, truncated=True),
        make_rollout([2], reward=nan, group_mean=nan, group_std=nan),
    ]
    whole, parts = ResponseStatistics(), ResponseStatistics()
    whole.update(make_batch(rows))
    for row in rows:
        parts.update(make_batch([row]))
    assert whole.compute() == parts.compute()
    got = {k: v.item() for k, v in whole.compute().items()}
    assert got == {
        "response/length": 3.0,
        "response/truncated": pytest.approx(1 / 3),
        "response/repetitive": 0.0,
        "response/repeated_trigrams": pytest.approx(2 / 3 / 3),
        "response/tokens_per_step": 9.0,
        "reward": 0.5,
        "response/degenerate_groups": 0.5,
    }
    whole.update(make_batch([replace(rows[2], unverified=True, long_views=("peer",))]))
    more = whole.compute()
    assert more["response/unverified"] == more["response/views_too_long"] == 0.25
    assert more["reward"] == 0.5


def test_a_group_is_degenerate_where_it_has_no_advantage() -> None:
    """The standard deviation of equal rewards may be a rounding error, such as that of 0.1."""
    rewards = np.array([0.1] * 3)
    assert rewards.std() > 0
    group = {"reward": 0.1, "group_mean": rewards.mean(), "group_std": rewards.std()}
    batch = make_batch([make_rollout([5], **group) for _ in rewards])
    assert group_advantage(batch.rewards, batch.group_mean, batch.group_std).tolist() == [[0]] * 3
    metric = ResponseStatistics()
    metric.update(batch)
    assert metric.compute()["response/degenerate_groups"] == 1


def test_what_could_not_be_checked_counts_as_wrong_where_it_is_measured() -> None:
    metric = SuiteScores(["a", "a"], 2, [2])
    nan = float("nan")
    unknown = replace(make_rollout([5], reward=nan, group=1), unverified=True)
    right = [make_rollout([5], reward=1.0, group=group) for group in (0, 0, 1)]
    metric.update([*right, unknown], ["7", "7", "8", None])
    got = metric.compute()
    found = [got[name].item() for name in ("score", "unverified", "majority")]
    assert found == [0.75, 0.25, 1.0]


def test_engine_gap_by_hand() -> None:
    metric = EngineStatistics()
    fresh = torch.tensor([True])
    metric.update(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0]), fresh.expand(2))
    metric.update(torch.tensor([-2.0]), torch.tensor([-2.0 + torch.tensor(3.0).log()]), fresh)
    got = {k: v.item() for k, v in metric.compute().items()}
    assert got["engine/logprob_gap_mean"] == pytest.approx(1.0986 / 3, abs=1e-4)
    assert got["engine/logprob_gap_max"] == pytest.approx(1.0986, abs=1e-4)
    assert got["engine/importance_mean"] == pytest.approx(5 / 3)
    assert got["engine/importance_max"] == pytest.approx(3.0)
    assert got["engine/importance_ess"] == pytest.approx(25 / (11 * 3))
    assert got["engine/compared"] == 1


def test_the_gap_is_that_of_the_newest_weights_alone() -> None:
    metric = EngineStatistics()
    behaviour, student = torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -4.0])
    metric.update(behaviour, student, torch.tensor([True, False]))
    got = {k: v.item() for k, v in metric.compute().items()}
    assert got["engine/logprob_gap_mean"] == got["engine/logprob_gap_max"] == 0.5
    weights = math.exp(-0.5), math.exp(-3)
    assert got["engine/importance_mean"] == pytest.approx(sum(weights) / 2)
    ess = sum(weights) ** 2 / (2 * sum(weight**2 for weight in weights))
    assert got["engine/importance_ess"] == pytest.approx(ess)
    assert got["engine/compared"] == 0.5
    metric.reset()
    metric.update(behaviour, student, torch.tensor([False, False]))
    assert "engine/logprob_gap_mean" not in metric.compute()
    assert metric.compute()["engine/compared"] == 0


def test_repetition_fixtures() -> None:
    noise = random.Random(0)
    assert is_repetitive("ab" * 10_000)
    assert not is_repetitive("".join(noise.choices(string.printable, k=20_000)))
    assert not is_repetitive("ab" * 100)  # too short to judge
    assert [is_repetitive(("ab" * 5_000)[start:]) for start in (0, 1)] == [True, False]
    # Zeros and ones in random order compress less than eightfold.
    assert not is_repetitive("".join(noise.choices("01", k=10_000)))
    # The end decides.
    mixed = "".join(noise.choices(string.printable, k=10_000))
    assert is_repetitive(mixed + "ab" * 5_000)
    assert not is_repetitive("ab" * 5_000 + mixed)


def test_repeated_trigrams_by_hand() -> None:
    assert repeated_trigrams([1, 2, 3, 1, 2, 3, 1]) == pytest.approx(2 / 5)  # 123 231 312 123 231
    assert repeated_trigrams(range(100)) == 0
    assert repeated_trigrams([7, 7]) == 0
    assert repeated_trigrams([2**21 - 1, 0, 0, 0, 0, 2**21 - 1]) == 1 / 4


def test_votes_are_counted_where_answers_are_extracted() -> None:
    metric = SuiteScores(["a", "a"], 2)
    for group, answers in ((0, ["7", "7"]), (1, None)):
        rows = [make_rollout([5], reward=1.0, group=group) for _ in range(2)]
        metric.update(rows, answers)
    assert metric.compute()["majority"] == 1


def test_a_text_is_greedy_if_all_of_its_own_tokens_are_the_likeliest() -> None:
    batch = make_batch([make_rollout([5, 6, 7]), make_rollout([5]), make_rollout([5, 6])])
    told = scores([[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0], [-1.0, -1.0, 0.0]], 0.0, [5, 9])
    likeliest = torch.tensor([[5, 6, 7], [5, 9, 9], [5, 8, 9]])
    top_ids = torch.stack([likeliest, torch.full_like(likeliest, 6)], dim=-1)
    found = likelihoods_of(batch, replace(told, top_ids=top_ids))
    assert found.tolist() == [[-6.0, 1.0], [-0.5, 1.0], [-2.0, 0.0]]


def test_suite_scores_are_means_by_domain() -> None:
    metric = SuiteScores(["a", "b", "b"])
    metric.update([make_rollout([5], reward=1.0, group=0), make_rollout([5, 2], group=1)])
    metric.update([make_rollout([5, 6, 7], reward=0.5, group=2, truncated=True)])
    got = {k: v.item() for k, v in metric.compute().items()}
    low, high = got.pop("score_low"), got.pop("score_high")
    assert 0 <= low < 0.5 < high <= 1
    assert got == {
        "score": 0.5,
        "score/a": 1.0,
        "score/b": 0.25,
        "length": 2.0,
        "truncated": pytest.approx(1 / 3),
    }


# Scores and answers of four samples for each of three prompts.
SCORES = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0]]
ANSWERS: list[list[str | None]] = [
    ["7", "7", "8", "9"],
    ["1", "1", "2", "3"],
    ["4", None, "5", None],
]


def suite_rows(prompt: int) -> tuple[list[Rollout], list[str | None]]:
    rows = [make_rollout([5] * (prompt + 1), reward=s, group=prompt) for s in SCORES[prompt]]
    return rows, ANSWERS[prompt]


def test_several_samples_by_enumeration() -> None:
    metric = SuiteScores(["x"] * 3, samples=4, pass_at=[1, 2, 4])
    for prompt in (2, 0, 1):
        metric.update(*suite_rows(prompt))
    got = {k: v.item() for k, v in metric.compute().items()}
    assert got["score"] == pytest.approx((2 / 4 + 1 / 4 + 0.5 / 4) / 3)
    for k in (1, 2, 4):
        subsets = [list(combinations(row, k)) for row in SCORES]
        expected = [sum(1.0 in one for one in those) / len(those) for those in subsets]
        assert got[f"pass_at_{k}"] == pytest.approx(sum(expected) / 3)
    # 7 is right; 1 is wrong; 4 (half right) and 5 tie.
    assert got["majority"] == pytest.approx((1 + 0 + 0.25) / 3)


def test_a_domain_alone_is_a_suite_of_its_own_prompts() -> None:
    whole, x, y = (SuiteScores(domains, 4, [2]) for domains in (["x", "y", "x"], ["x"] * 2, ["y"]))
    for prompt in range(3):
        whole.update(*suite_rows(prompt))
    for domain, metric in ((x, [0, 2]), (y, [1])):
        for place, prompt in enumerate(metric):
            rows, answers = suite_rows(prompt)
            domain.update([replace(row, group=place) for row in rows], answers)
    assert whole.compute_by_domain() == {"x": x.compute(), "y": y.compute()}
    assert not x.compute_by_domain()  # there is but one


def test_ranks_with_different_prompts_add_up_to_the_whole() -> None:
    whole, *ranks = (SuiteScores(["x", "y", "x"], 4, [2]) for _ in range(3))
    for prompt in range(3):
        whole.update(*suite_rows(prompt))
        ranks[prompt % 2].update(*suite_rows(prompt))
    # What torchmetrics does to states with dist_reduce_fx "sum".
    for name in whole._defaults:
        setattr(ranks[0], name, getattr(ranks[0], name) + getattr(ranks[1], name))
    assert ranks[0].compute() == whole.compute()


@pytest.mark.parametrize(
    ("prompts", "samples", "rate", "alike"),
    [
        (300, 1, 0.3, 0.0),
        (30, 1, 0.95, 0.0),
        (24, 5, 0.98, 0.0),
        (24, 5, 0.98, 0.6),
        (24, 5, 0.5, 0.2),
        (100, 4, 0.9, 0.6),
    ],
)
def test_an_interval_covers_as_often_as_it_says(
    prompts: int, samples: int, rate: float, alike: float
) -> None:
    """Samples of a prompt are alike: beta-distributed rates with an intra-class correlation."""
    draw, hits, trials = np.random.default_rng(0), 0, 1000
    for _ in range(trials):
        size = (1 - alike) / alike if alike else None
        rates = draw.beta(rate * size, (1 - rate) * size, prompts) if size else [rate] * prompts
        scores = draw.random((prompts, samples)) < np.array(rates)[:, None]
        low, high = interval(torch.from_numpy(scores))
        hits += bool(low <= rate <= high)
    assert 0.93 <= hits / trials <= 0.985  # standard error 0.007; Wilson's is coarse


@pytest.mark.parametrize("right", [0, 1, 15, 30])
def test_the_interval_of_single_samples_is_wilson_s(right: int) -> None:
    scores = (torch.arange(30) < right).double()[:, None]
    z, share = 1.959963984540054, right / 30
    root = math.sqrt(share * (1 - share) * 30 + z * z / 4)
    expected = [(right + z * z / 2 + sign * z * root) / (30 + z * z) for sign in (-1, 1)]
    assert [bound.item() for bound in interval(scores)] == pytest.approx(expected, abs=1e-12)


def test_an_interval_knows_what_samples_say() -> None:
    """Samples that always agree count as one; scores between 0 and 1 vary less."""
    single = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    assert interval(single.expand(4, 5)) == interval(single)
    assert interval(torch.ones(4, 5)) == interval(torch.ones(4, 1))
    assert interval(torch.ones(1, 1))[0] < 0.3
    # Variance 0.02 / 3, so that 0.25 / (0.02 / 3 / 4) = 150 responses say as much.
    found = interval(torch.tensor([[0.4], [0.5], [0.6], [0.5]], dtype=torch.float64))
    expected = wilson(torch.tensor(0.5, dtype=torch.float64), 150)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected])
    # Averages 1/2, 1/2, 1/2, 1 vary less than by chance: eight responses say no more than eight.
    alike = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert interval(alike) == wilson(torch.tensor(0.625, dtype=torch.float64), 8)


@pytest.mark.parametrize("samples", [1, 2, 6])
def test_a_suite_measures_powers_of_two_and_all_samples(samples: int) -> None:
    source = PromptSource("p.jsonl")
    suite = EvaluationSuite(prompts=source, samples=samples)
    assert suite.scores(Loaded([], [])).pass_at == {1: [], 2: [2], 6: [2, 4, 6]}[samples]
    with pytest.raises(UserError, match=f"got {samples + 1}, expected 1 to {samples}"):
        EvaluationSuite(prompts=source, samples=samples, pass_at=[samples + 1])


def test_timer_counts_stages_and_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 5.0, 6.0, 7.0, 15.0, 16.0])
    monkeypatch.setattr("opd_lightning.timing.perf_counter", lambda: next(clock))
    timer = StepTimer()
    timer.next_step()  # 0
    with timer.stage("generate"):  # 1 to 4
        pass
    timer.pause()  # 5
    with timer.stage("generate"):  # 6 to 7, in the pause
        pass
    timer.resume()  # 15
    timer.next_step()  # 16
    assert timer.last == {"generate": 3.0, "step": 6.0, "overhead": 0.5}
    assert timer.figures(12.0) == {
        "tokens_per_second": 2.0,
        "time/overhead": 0.5,
        "time/generate_seconds": 3.0,
        "time/step_seconds": 6.0,
        "cost/generate_us_per_token": 250_000.0,
        "cost/step_us_per_token": 500_000.0,
    }


def test_what_every_trainer_does_is_no_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("opd_lightning.timing.perf_counter", lambda: next(clock))
    timer = StepTimer()
    timer.next_step()
    for stage in ("generate", "student", "teacher", "backward", "optimizer", "verify", "push"):
        timer.add(stage, 1.0)
    timer.next_step()
    assert timer.last["overhead"] == 0.5


def test_what_others_wrote_is_counted_apart() -> None:
    metric = ResponseStatistics()
    given = {"author": Author.TEACHER, "group_mean": float("nan"), "group_std": float("nan")}
    rows = [
        make_rollout([5, 6, 7], reward=0.0),
        make_rollout([5] * 9, reward=1.0, **given),  # type: ignore[arg-type]
        make_rollout([5], reward=0.0, dropped=True, **given),  # type: ignore[arg-type]
        make_rollout([5] * 2, reward=float("nan"), **given),  # type: ignore[arg-type]
    ]
    metric.update(make_batch(rows))
    got = {name: value.item() for name, value in metric.compute().items()}
    assert got["reward"] == 0
    assert got["response/length"] == 3
    assert got["response/tokens_per_step"] == 14
    assert got["demonstration/length"] == 4
    assert got["demonstration/kept"] == pytest.approx(2 / 3)
    assert got["demonstration/reward"] == pytest.approx(1 / 3)
    metric.update(make_batch([replace(rows[1], long_views=("peer",))]))
    assert metric.compute()["response/views_too_long"].item() == pytest.approx(1 / 5)


def test_of_too_many_names_the_first_have_means() -> None:
    batch, means = make_batch([make_rollout([5, 6])]), Means()
    for _ in range(2):
        means.update(batch, {f"{i}": torch.full((1, 2), float(i)) for i in range(302)})
    got = {name: value.item() for name, value in means.compute().items()}
    assert got == {f"{i}": i for i in range(Means.MAX_NAMES)}


def test_teachers_by_domain_by_hand_and_over_micro_batches() -> None:
    rollouts = [
        make_rollout([5, 6], domain="math"),
        make_rollout([7], domain="code"),
        make_rollout([8], domain="math"),
    ]
    student, teacher = (
        scores([[-1.0, -2.0], [-1.0, 0.0], [-3.0, 0.0]], 0.0, []),
        scores([[-0.5, -3.0], [-4.0, 0.0], [-2.0, 0.0]], 0.0, []),
    )
    whole, parts = TeacherStatistics(), TeacherStatistics()
    domains = ["code", "law", "math"]
    batch = make_batch(rollouts)
    whole.update(batch, domains, student, teacher, batch.response_mask)
    for row in range(3):
        one = batch.select([row])
        mine, theirs = (
            replace(s, logprobs=s.logprobs[[row]], entropy=s.entropy[[row]])
            for s in (student, teacher)
        )
        parts.update(one, domains, mine, theirs, one.response_mask)
    found = {name: float(value) for name, value in whole.compute().items()}
    assert found == pytest.approx(
        {
            "teacher/code/share": 1 / 4,
            "teacher/code/log_ratio_mean": -3.0,
            "teacher/code/log_ratio_abs_mean": 3.0,
            "teacher/law/share": 0.0,
            "teacher/math/share": 3 / 4,
            "teacher/math/log_ratio_mean": (0.5 - 1.0 + 1.0) / 3,
            "teacher/math/log_ratio_abs_mean": 2.5 / 3,
        }
    )
    assert found == pytest.approx({name: float(x) for name, x in parts.compute().items()})


def test_prompts_that_are_not_measured_are_left_out() -> None:
    metric, alone = SuiteScores(["x", "y", "x", "z"], 4, [2]), SuiteScores(["x", "y"], 4, [2])
    for prompt in (0, 1):
        metric.update(*suite_rows(prompt))
        alone.update(*suite_rows(prompt))
    got = metric.compute()
    assert got.pop("measured") == 2
    assert got == alone.compute()
    by_domain = metric.compute_by_domain()
    assert by_domain.keys() == {"x", "y"}
    assert by_domain["x"].pop("measured") == 1
    assert by_domain == alone.compute_by_domain()
