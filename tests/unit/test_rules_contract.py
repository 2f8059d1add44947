"""Contract tests of all rules: masks only shrink, padding has no effect, steps are exact."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

import opd_lightning.rules
from opd_lightning.losses.schedule import Linear
from opd_lightning.rules.agreement import AlignedReweighting, MarginShift
from opd_lightning.rules.base import Rule, Scored, Signal, add_rates
from opd_lightning.rules.change_point import ChangePointMask
from opd_lightning.rules.controls import RandomGate
from opd_lightning.rules.evidence import EvidenceMask, EvidenceMultiplier, EvidenceWeight
from opd_lightning.rules.gates import (
    CorrectnessGate,
    GroupGate,
    OnlyCorrect,
    SignGate,
    TrajectoryGate,
)
from opd_lightning.rules.imitation import EntropyWeight, InDistributionWeight, LikelihoodWeight
from opd_lightning.rules.importance import DriftGate, IcePop, TruncatedImportance
from opd_lightning.rules.masks import (
    HighEntropyMask,
    LikelihoodMask,
    PrefixWindow,
    SkipFirst,
    TeacherEntropyMask,
    TokenImportanceMask,
    TokenMask,
)
from opd_lightning.rules.outcomes import CompetenceWeight, RewardWeight, TeacherRatio
from opd_lightning.rules.regulation import (
    AddOutcome,
    Floor,
    HardClip,
    PhasedFloor,
    PowerReward,
    ReliableExtrapolation,
    SoftLog,
    VocabularyBaseline,
)
from opd_lightning.rules.weights import (
    LateWeight,
    PositionWeight,
    ScopeWeight,
    StabilityWeight,
)
from opd_lightning.training.step_divisors import divide_the_loss
from opd_lightning.types import RolloutBatch
from tests.toy import applied, make_scored, opd_signal

RULES: list[Rule] = [
    SignGate(),
    SignGate(fallback="grpo"),
    CorrectnessGate(),
    GroupGate(),
    TrajectoryGate(),
    EvidenceMask(),
    EvidenceMask("near-zero", width=1.0),
    EvidenceWeight(),
    EvidenceMultiplier(mix=Linear(start=1.0, end=0.0, steps=4)),
    EvidenceMultiplier(evidence="student"),
    PrefixWindow(3),
    SkipFirst(2),
    TokenMask((3, 4)),
    HardClip(low=-1.0, high=0.5),
    SoftLog(),
    Floor(),
    PhasedFloor(switch_step=9),
    PhasedFloor(switch_step=0),
    VocabularyBaseline(),
    StabilityWeight(tau=0.5),
    PositionWeight(),
    ScopeWeight(),
    TruncatedImportance(cap=1.1),
    TruncatedImportance(level="sequence", cap=1.1),
    TruncatedImportance(cap=1.1, unit_mean=True),
    TruncatedImportance(level="sequence", cap=1.1, unit_mean=True),
    IcePop(low=0.9, high=1.2),
    OnlyCorrect(),
    OnlyCorrect(keep="wrong"),
    RandomGate(0.5),
    RandomGate(0.5, per="rollout"),
    AddOutcome(0.5),
    LikelihoodWeight(),
    LikelihoodWeight(form="p(1-p)"),
    TeacherEntropyMask(),
    HighEntropyMask(0.5),
    PowerReward(),
    ReliableExtrapolation(0.5, tau=1.0),
    LateWeight(),
    LikelihoodWeight(power=3.0),
    InDistributionWeight(),
    EntropyWeight(),
    LikelihoodMask(least=0.3),
    TokenImportanceMask(),
    DriftGate(2.0, block=2),
    CompetenceWeight(),
    RewardWeight(0.5),
    TeacherRatio(),
    ChangePointMask(block=1, penalty=0.0, least=1),
    AlignedReweighting(2.0),
    MarginShift(3.0),
    MarginShift(3.0, statistic="extreme", moves="wrong"),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)

ROWS, LENGTH = 10, 6
NO_TOKENS, LEFT_OUT, LONE, DEGENERATE = 3, 4, 9, slice(5, 7)  # special rows


def random_step(seed: int, padding: float = 0.0) -> tuple[Scored, Signal]:
    """A step of rollouts of several kinds, with `padding` wherever there is no response token."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand(ROWS, LENGTH, generator=generator, dtype=torch.float64)
        return torch.where(mask, low + (high - low) * values, padding)

    lengths = torch.randint(2, LENGTH + 1, (ROWS,), generator=generator)
    lengths[NO_TOKENS] = 0
    mask = torch.arange(LENGTH) < lengths[:, None]
    student = uniform(-4, 0)
    on_policy = [True] * ROWS
    behaviour = student + uniform(-0.3, 0.3)
    on_policy[7], on_policy[8] = False, False
    behaviour[8] = torch.nan  # recorded: no sampler
    rewards = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    scored = make_scored(
        student,
        uniform(-4, 0),
        mask=mask,
        rewards=rewards,
        groups=[0, 0, 0, 0, 0, 1, 1, 2, 2, 3],
        on_policy=on_policy,
        behaviour=behaviour,
        entropy=uniform(0, 3),
        ids=torch.randint(2, 7, mask.shape, generator=generator),
        values={
            "baseline": uniform(0, 2),
            "token_importance": uniform(0, 1),
            "relative_entropy": uniform(0, 1),
            "teacher_margin": uniform(0, 1),
        },
        step=2,
        plain=uniform(-4, 0),
        reference=uniform(-4, 0),
    )
    taking_part = mask & (torch.rand(mask.shape, generator=generator) > 0.2)
    taking_part[LEFT_OUT] = False
    teacher = replace(scored.teacher, entropy=uniform(0, 3))
    scored = replace(scored, others={**scored.others, "teacher": teacher})
    return scored, opd_signal(scored, taking_part)


def rows_of(scored: Scored, signal: Signal, rows: slice) -> tuple[Scored, Signal]:
    """A micro-batch of a step."""

    def cut(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in values.items()}

    fields = vars(scored.batch)
    tensors = cut({name: x for name, x in fields.items() if isinstance(x, Tensor)})
    batch = SimpleNamespace(**{**fields, **tensors})

    def cut_scores(scores: object) -> dict[str, Tensor]:
        return cut({name: getattr(scores, name) for name in ("logprobs", "entropy", "top_ids")})

    return (
        replace(
            scored,
            batch=cast(RolloutBatch, batch),
            student=replace(scored.student, **cut_scores(scored.student)),
            others={name: replace(x, **cut_scores(x)) for name, x in scored.others.items()},
            values=cut(scored.values),
        ),
        Signal(
            advantage=signal.advantage[rows], weight=signal.weight[rows], mask=signal.mask[rows]
        ),
    )


def test_every_rule_is_here() -> None:
    for module in pkgutil.iter_modules(opd_lightning.rules.__path__):
        importlib.import_module(f"opd_lightning.rules.{module.name}")

    def below(kind: type[Any]) -> set[type[Any]]:
        children: list[type[Any]] = kind.__subclasses__()
        return {kind, *(leaf for child in children for leaf in below(child))}

    public = {k for k in below(Rule) - {Rule} if not k.__name__.startswith("_")}
    ours = {k for k in public if k.__module__.startswith("opd_lightning.")}
    assert ours == {type(rule) for rule in RULES}


@every_rule
@pytest.mark.parametrize("seed", range(3))
def test_tokens_left_out_stay_out_and_are_not_touched(rule: Rule, seed: int) -> None:
    scored, signal = random_step(seed)
    after, rates = applied(rule, scored, signal)
    assert not (after.mask & ~signal.mask).any()
    for name in ("advantage", "weight"):
        new, old = getattr(after, name), getattr(signal, name)
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        assert new.isfinite().all()
        assert torch.equal(new[~signal.mask], old[~signal.mask])
        assert rule.shapes_advantage or name == "weight" or torch.equal(new, old)
    for rate in rates.values():
        assert rate.shape == signal.mask.shape
        assert rate.isfinite().all()


@every_rule
def test_a_rule_does_something(rule: Rule) -> None:
    """Or the tests above would pass for one that does nothing."""
    scored, signal = random_step(0)
    after, rates = applied(rule, scored, signal)
    assert any(
        not torch.equal(getattr(after, name), getattr(signal, name))
        for name in ("advantage", "weight", "mask")
    )
    assert all(rate.sum() != 0 for rate in rates.values())


@every_rule
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, -7.0])
def test_nothing_depends_on_what_padding_holds(rule: Rule, padding: float) -> None:
    after, rates = applied(rule, *random_step(0))
    scored, signal = random_step(0, padding)
    other, other_rates = applied(rule, scored, signal)
    assert torch.equal(after.mask, other.mask)
    assert torch.equal(after.advantage, other.advantage)
    assert torch.equal(after.weight, other.weight)
    assert rates.keys() == other_rates.keys()
    assert all(torch.equal(rates[name], other_rates[name]) for name in rates)


@every_rule
def test_a_signal_is_not_changed_in_place(rule: Rule) -> None:
    scored, signal = random_step(0)
    before = Signal(
        advantage=signal.advantage.clone(), weight=signal.weight.clone(), mask=signal.mask.clone()
    )
    applied(rule, scored, signal)
    for name in ("advantage", "weight", "mask"):
        assert torch.equal(getattr(before, name), getattr(signal, name))


@every_rule
def test_micro_batches_add_up_to_the_step(rule: Rule) -> None:
    """Group 0 is cut in two, and the last micro-batch is one of padding and left-out tokens."""
    scored, signal = random_step(1)
    whole, rates = applied(rule, scored, signal)
    parts = [rows_of(scored, signal, rows) for rows in (slice(0, 3), slice(3, 5), slice(5, ROWS))]
    observed = None
    if rule.step_wide:
        seen = [rule.observe(s, o) for o, s in parts]
        assert all(isinstance(rows, Tensor) and rows.dim() == 2 for rows in seen)
        observed = torch.cat([rows for rows in seen if rows is not None])
    else:
        assert rule.observe(signal, scored) is None or isinstance(rule, TruncatedImportance)
    results = [rule.apply(s, o, observed) for o, s in parts]
    for name in ("advantage", "weight", "mask"):
        together = torch.cat([getattr(after, name) for after, _ in results])
        torch.testing.assert_close(together, getattr(whole, name), atol=1e-12, rtol=0)
    for name, rate in rates.items():
        together = torch.cat([more[name] for _, more in results])
        torch.testing.assert_close(together, rate, atol=1e-12, rtol=0)


@every_rule
def test_a_rule_that_ignores_weights_leaves_a_factor_on_them_alone(rule: Rule) -> None:
    """So a mean that divides all weights may divide the loss instead: `divide_the_loss`."""
    scored, signal = random_step(0)
    after, _ = applied(rule, scored, signal)
    scaled, _ = applied(rule, scored, replace(signal, weight=4 * signal.weight))
    if rule.ignores_weights:
        assert torch.equal(scaled.weight, 4 * after.weight)
        assert torch.equal(scaled.advantage, after.advantage)
        assert torch.equal(scaled.mask, after.mask)


def test_rates_of_several_rules_of_a_kind_are_kept_apart() -> None:
    rates: dict[str, Tensor] = {}
    for share in (0.25, 0.5, 0.75):
        add_rates(rates, {"gate/kept": torch.tensor(share), f"only/{share}": torch.tensor(1.0)})
    found = {name: rate.item() for name, rate in rates.items() if name.startswith("gate")}
    assert found == {"gate/kept": 0.25, "gate/kept#2": 0.5, "gate/kept#3": 0.75}
    assert len(rates) == 6


def test_a_clip_behind_a_mean_of_the_step_costs_no_pass() -> None:
    assert divide_the_loss([StabilityWeight(tau=0.5), HardClip()], 0)


@every_rule
def test_a_step_without_a_token_is_no_accident(rule: Rule) -> None:
    scored, signal = random_step(0)
    nothing = replace(signal, mask=torch.zeros_like(signal.mask))
    after, rates = applied(rule, scored, nothing)
    assert not after.mask.any()
    assert torch.equal(after.advantage, signal.advantage)
    assert torch.equal(after.weight, signal.weight)
    assert all(rate.isfinite().all() for rate in rates.values())


@every_rule
def test_single_precision_stays_single(rule: Rule) -> None:
    scored, signal = random_step(0)

    def single(scores: object) -> dict[str, Tensor]:
        return {name: getattr(scores, name).float() for name in ("logprobs", "entropy")}

    fields = vars(scored.batch)
    floats = {n: x.float() for n, x in fields.items() if getattr(x, "dtype", 0) == torch.float64}
    after, rates = applied(
        rule,
        replace(
            scored,
            batch=cast(RolloutBatch, SimpleNamespace(**{**fields, **floats})),
            student=replace(scored.student, **single(scored.student)),
            others={name: replace(x, **single(x)) for name, x in scored.others.items()},
            values={name: x.float() for name, x in scored.values.items()},
        ),
        replace(signal, advantage=signal.advantage.float(), weight=signal.weight.float()),
    )
    values = [after.advantage, after.weight, *rates.values()]
    assert {value.dtype for value in values} == {torch.float32}


SCHEDULE = {
    "class_path": "opd_lightning.losses.schedule.Linear",
    "init_args": {"start": 1.0, "end": 0.0, "steps": 4},
}


def parsed(kind: type[Rule], fields: dict[str, Any]) -> list[Rule]:
    """Rules as a configuration writes them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rules", type=list[Rule])
    written = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": fields}
    rules: list[Rule] = parser.instantiate(parser.parse_object({"rules": [written]})).rules
    return rules


def as_written(value: Any) -> Any:
    if isinstance(value, Linear):
        return SCHEDULE
    return list(value) if isinstance(value, tuple) else value  # YAML has no tuples


@every_rule
def test_a_configuration_names_it(rule: Rule) -> None:
    fields = {name: as_written(value) for name, value in vars(rule).items()}
    assert parsed(type(rule), fields) == [rule]


@every_rule
def test_the_parser_knows_the_types(rule: Rule) -> None:
    """Without them it would accept any value, such as a misspelt choice."""
    good = {name: as_written(value) for name, value in vars(rule).items()}
    for name in good:
        with pytest.raises(ArgumentError, match="Expected a "):
            parsed(type(rule), {**good, name: "nonsense"})
