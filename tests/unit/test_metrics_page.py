"""docs/metrics.md against the code: no rate of a rule, and no figure of a metric, is missing."""

import ast
from pathlib import Path

import pytest

from opd_lightning.metrics.directions import HIGHER, LOWER
from tests.metrics_page import listed, unlisted
from tests.sources import parsed

PACKAGE = Path(__file__).parents[2] / "opd_lightning"


def names_in(package: str) -> set[str]:
    """Return the strings of a package's code that are names of figures, `group/name`."""
    trees = [parsed(path) for path in (PACKAGE / package).glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    strings = {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts
    }
    return {
        s for s in strings if s.count("/") == 1 and s.replace("/", "").replace("_", "").isalpha()
    }


def test_every_rate_of_a_rule_is_listed() -> None:
    rates = {f"rule/{name}" for name in names_in("rules")}
    assert len(rates) > 15
    assert not unlisted(rates)
    # And the page has none that is gone.
    assert {n for n in listed() if n.count("/") == 2 and n.startswith("rule/")} == rates


@pytest.mark.parametrize("package", ["methods", "metrics", "training"])
def test_every_figure_of_a_step_is_listed(package: str) -> None:
    assert names_in(package)
    assert not unlisted(names_in(package))


def test_every_figure_with_a_better_direction_is_listed() -> None:
    assert {*HIGHER, *LOWER} <= set(listed())
    assert not set(HIGHER) & set(LOWER)


def test_no_figure_is_listed_twice() -> None:
    assert len(listed()) == len(set(listed()))
