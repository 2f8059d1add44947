"""`opd lab`: tiny models and data made on the spot, and the demonstration."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from opd_lightning.lab.build import Recipe, build_arithmetic
from opd_lightning.lab.demo import demonstrate


def build(recipe: Recipe = Recipe(), link: str = "lab/arithmetic") -> None:  # noqa: B008
    """Make the arithmetic lab: data, a strong teacher, a weak student. Cached by recipe.

    Args:
        recipe: What to make; every number of it can be set.
        link: Symbolic link to the made folder, which configs/lab names.
    """
    print(build_arithmetic(recipe, Path(link)))


def demo(run: str = "runs/demo") -> None:
    """Distil the lab's teacher into its student and show the result.

    Args:
        run: Run folder to write; must not exist.
    """
    demonstrate(Path(run))


def main(args: list[str]) -> None:
    """Entry point of `opd lab`."""
    auto_cli({"build": build, "demo": demo}, args=args, prog="opd lab")
