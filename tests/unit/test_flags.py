"""Options that need no value."""

import pytest

from opd_lightning.commands.flags import with_values


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["check", "--json"], ["check", "--json", "true"]),
        (["--json", "runs/a"], ["--json", "true", "runs/a"]),
        (["--group", "--json", "false"], ["--group", "true", "--json", "false"]),
        (["--json=true", "--tags", "loss"], ["--json=true", "--tags", "loss"]),
    ],
)
def test_a_flag_stands_for_true_unless_a_value_follows(
    args: list[str], expected: list[str]
) -> None:
    assert with_values(args) == expected
