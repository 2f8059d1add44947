"""The change point by hand and by search, and the margin by enumeration."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.rules.base import Scored
from opd_lightning.rules.change_point import ChangePointMask, Margin, before_fall
from tests.toy import applied, make_scored


def of_margins(*rows: list[float]) -> Scored:
    length = max(map(len, rows))
    mask = torch.tensor([[t < len(row) for t in range(length)] for row in rows])
    margins = torch.tensor([row + [math.nan] * (length - len(row)) for row in rows]).double()
    zero = torch.zeros(mask.shape, dtype=torch.float64)
    values = {ChangePointMask.comparison: margins}
    return make_scored(zero, zero, mask=mask, values=values)


def kept(rule: ChangePointMask, *rows: list[float]) -> list[int]:
    signal, rates = applied(rule, of_margins(*rows))
    assert torch.equal(rates["change_point/kept"] > 0, signal.mask)
    for row in signal.mask.tolist():  # a prefix
        assert all(one >= other for one, other in pairwise(row))
    return signal.mask.sum(dim=1).tolist()


HIGH, LOW = [0.9, 0.8, 0.9], [0.1, 0.2, 0.1]


def test_by_hand() -> None:
    rule = ChangePointMask(block=1)
    # A fall; a rise; nothing; a fall with too few values behind it; one of two, the largest.
    rows = [HIGH + LOW, LOW + HIGH, HIGH + HIGH, HIGH + LOW[:2], [*HIGH, 0.6, 0.7, 0.6, *LOW]]
    assert kept(rule, *rows) == [3, 6, 6, 5, 6]
    flat, single = [0.3] * 8, [0.9]
    assert kept(rule, flat, single) == [8, 1]
    assert applied(rule, of_margins(HIGH + LOW, flat))[1]["change_point/cut"].tolist() == [
        [1.0] * 6 + [0.0] * 2,
        [0.0] * 8,
    ]


def test_a_cut_is_behind_a_block() -> None:
    row = [x for x in HIGH + LOW for _ in range(4)]
    assert kept(ChangePointMask(block=4), row, row[:-3]) == [12, 12]
    assert kept(ChangePointMask(block=4), row[:-4]) == [20]  # two blocks behind the fall


def test_it_is_the_split_that_bic_chooses() -> None:
    """By search over all splits; the penalty is that of a second mean and a place."""
    generator = torch.Generator().manual_seed(0)

    def rss(values: Tensor) -> float:
        return float((values - values.mean()).square().sum())

    found = set()
    for shift in (0.0, 0.3, 1.0):
        for _ in range(20):
            n = int(torch.randint(6, 15, (), generator=generator))
            values = torch.rand(n, generator=generator, dtype=torch.float64)
            values[: n // 2] += shift
            splits = {
                j: rss(values[:j]) + rss(values[j:])
                for j in range(3, n - 2)
                if values[:j].mean() > values[j:].mean()
            }
            best = min(splits, key=splits.__getitem__, default=n)
            bic = {n: n * math.log(rss(values) / n) + math.log(n)}
            if best < n:
                bic[best] = n * math.log(splits[best] / n) + 3 * math.log(n)
            expected = min(bic, key=bic.__getitem__)
            padded = torch.cat([values, torch.zeros(3)])[None]
            got = before_fall(padded, torch.tensor([n]), penalty=2.0, least=3)
            assert got.tolist() == [expected]
            found.add(expected < n)
    assert found == {True, False}


def test_the_penalty_decides_between_a_cut_and_none() -> None:
    row = [0.6, 0.5, 0.7, 0.4, 0.5, 0.45]
    assert kept(ChangePointMask(block=1, penalty=0.0), row) == [3]
    assert kept(ChangePointMask(block=1, penalty=math.inf), row) == [6]


def test_the_margin_is_the_teachers_over_the_students_tokens() -> None:
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    teacher = torch.tensor([[0.1, 0.15, 0.25, 0.5]]).log()
    expected = {2: 0.05, 3: 0.1, 4: 0.25, 9: 0.25}
    assert {k: pytest.approx(float(Margin(k)(student, teacher))) for k in expected} == expected


@pytest.mark.parametrize("field", [{"top_k": 1}, {"block": 0}, {"penalty": math.nan}, {"least": 0}])
def test_fields_are_checked(field: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        ChangePointMask(**field)  # type: ignore[arg-type]
