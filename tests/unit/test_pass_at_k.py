"""pass@k on a hand-made matrix, against enumeration of all subsets."""

from itertools import combinations

import pytest
import torch

from opd_lightning.errors import UserError
from opd_lightning.evaluation.statistics import pass_at_k

CORRECT = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)


def test_u24_pass_at_k_by_hand() -> None:
    assert pass_at_k(CORRECT, 1).tolist() == [0.5, 0.0, 0.25]
    assert pass_at_k(CORRECT, 2).tolist() == [5 / 6, 0.0, 0.5]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_u24_unbiased_is_the_mean_over_all_subsets(k: int) -> None:
    subsets = list(combinations(range(4), k))
    for row, estimate in zip(CORRECT.tolist(), pass_at_k(CORRECT, k).tolist(), strict=True):
        hits = sum(any(row[i] for i in subset) for subset in subsets)
        assert estimate == hits / len(subsets)


def test_u24_at_k_equal_n_it_is_pass_at_n() -> None:
    assert torch.equal(pass_at_k(CORRECT, 4), CORRECT.any(dim=1).double())


def test_exact_where_floating_point_products_are_not() -> None:
    """One right of 1024 samples at k 512: exactly one half; binomials have 300 digits."""
    correct = torch.zeros(1, 1024, dtype=torch.bool)
    correct[0, 7] = True
    assert pass_at_k(correct, 512).tolist() == [0.5]


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(UserError, match=f"k is {k}, expected 1 to 4"):
        pass_at_k(CORRECT, k)
