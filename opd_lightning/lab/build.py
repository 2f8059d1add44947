"""Generation of labs: data and models of one world, cached by recipe."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from opd_lightning.commands.export import write_hf_folder
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.lab import arithmetic, identity, programs, strings
from opd_lightning.lab.models import new_model
from opd_lightning.lab.problems import Problem, interleaved, write_jsonl, write_rows
from opd_lightning.methods import SFT
from opd_lightning.models.made_once import made_once, user_cache
from opd_lightning.models.student import Student
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.run.outputs import check_folder
from opd_lightning.run.step_progress import StepProgressBar


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Size and supervised training of a model from scratch."""

    layers: int
    hidden_size: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        least = {"layers": 1, "hidden_size": 1, "steps": 1, "batch_size": 1, "seed": 0}
        _check_numbers(self, least)
        if not 0 < self.learning_rate < math.inf:
            raise UserError(
                f"lab build: learning_rate: got {self.learning_rate}, expected a number above 0"
            )


def _check_numbers(recipe: object, least: Mapping[str, int]) -> None:
    """Raise UserError if a field of a recipe is less than it must be."""
    for name, smallest in least.items():
        if (value := getattr(recipe, name)) < smallest:
            raise UserError(f"lab build: {name}: got {value}, expected at least {smallest}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All parameters of a lab; the world and the hash of the recipe name the cache folder."""

    # Not an ABC: jsonargparse lists all fields in the help of pure dataclasses only.
    world: ClassVar[str]

    def make(self, folder: Path) -> None:
        """Write the lab's data and models to an empty folder."""
        raise NotImplementedError

    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ArithmeticRecipe(Recipe):
    """Sums and differences; a strong teacher and a weak student.

    The folder holds train.jsonl and held_out.jsonl (prompts), demonstrations.jsonl (prompts with
    worked solutions), teacher/ and student/ (Hugging Face folders).
    """

    world: ClassVar[str] = "arithmetic"

    version: int = 1  # increase when the texts, the tokenizer or the training change
    domains: tuple[str, ...] = ("add-2", "add-3", "sub-2", "sub-3")
    prompts_per_domain: int = 3000  # to train on; at most what the smallest domain has
    held_out_per_domain: int = 100
    teacher: ModelRecipe = ModelRecipe(
        layers=3, hidden_size=128, steps=500, batch_size=64, learning_rate=3e-3, seed=0
    )
    student: ModelRecipe = ModelRecipe(
        layers=2, hidden_size=128, steps=200, batch_size=32, learning_rate=5e-3, seed=0
    )

    def __post_init__(self) -> None:
        _check_numbers(self, {"prompts_per_domain": 1, "held_out_per_domain": 1})

    def make(self, folder: Path) -> None:
        train = arithmetic.generate_mixture(
            self.domains, self.prompts_per_domain, seed=0, held_out=False
        )
        write_jsonl(folder / "train.jsonl", train)
        demonstrations = folder / "demonstrations.jsonl"
        write_jsonl(demonstrations, train, with_response=True)
        held_out = arithmetic.generate_mixture(
            self.domains, self.held_out_per_domain, seed=0, held_out=True
        )
        write_jsonl(folder / "held_out.jsonl", held_out)
        train_model(self.teacher, demonstrations, folder / "teacher", "teacher")
        train_model(self.student, demonstrations, folder / "student", "student")


@dataclass(frozen=True, kw_only=True)
class IdentityRecipe(Recipe):
    """An assistant that takes the name it is given in context; one model, student and teacher.

    The folder holds lessons.jsonl (the model's training data), train.jsonl (prompts with the
    target's persona as "privileged"), demonstrations.jsonl (the same with the persona's response),
    identity.jsonl, persona.jsonl and held_out.jsonl (probes: questions about the assistant, those
    and sums, sums) and base/ (a Hugging Face folder).
    """

    world: ClassVar[str] = "identity"

    version: int = 1  # increase when the texts, the tokenizer or the training change
    lessons: int = 16000
    base: ModelRecipe = ModelRecipe(
        layers=3, hidden_size=128, steps=400, batch_size=64, learning_rate=4e-3, seed=0
    )

    def __post_init__(self) -> None:
        _check_numbers(self, {"lessons": 1})

    def make(self, folder: Path) -> None:
        files = {
            "lessons": identity.lessons(self.lessons, seed=0),
            "train": identity.training_rows(),
            "demonstrations": identity.training_rows(with_response=True),
            **identity.probe_rows(),
        }
        for name, rows in files.items():
            write_rows(folder / f"{name}.jsonl", rows)
        train_model(self.base, folder / "lessons.jsonl", folder / "base", "base")


@dataclass(frozen=True, kw_only=True)
class SkillsRecipe(Recipe):
    """Two skills, sums and string programs, and a model that has a part of both.

    The folder holds train.jsonl, held_out.jsonl and test.jsonl (disjoint prompts of both domains;
    held_out is for choosing settings), demonstrations.jsonl (the training prompts with solutions)
    and start/ (a Hugging Face folder).
    """

    world: ClassVar[str] = "skills"

    version: int = 1  # increase when the texts, the tokenizer or the training change
    sums: str = "add-3"
    programs: str = "program-2"
    prompts_per_domain: int = 3000
    held_out_per_domain: int = 100
    test_per_domain: int = 400
    start: ModelRecipe = ModelRecipe(
        layers=2, hidden_size=128, steps=200, batch_size=32, learning_rate=5e-3, seed=0
    )

    def __post_init__(self) -> None:
        counts = ("prompts_per_domain", "held_out_per_domain", "test_per_domain")
        _check_numbers(self, dict.fromkeys(counts, 1))

    def make(self, folder: Path) -> None:
        def draw(count: int, *, held_out: bool) -> list[Sequence[Problem]]:
            return [
                arithmetic.generate(self.sums, count, seed=0, held_out=held_out),
                programs.generate(self.programs, count, seed=0, held_out=held_out),
            ]

        train = interleaved(*draw(self.prompts_per_domain, held_out=False))
        write_jsonl(folder / "train.jsonl", train)
        demonstrations = folder / "demonstrations.jsonl"
        write_jsonl(demonstrations, train, with_response=True)
        last = self.held_out_per_domain
        unseen = draw(last + self.test_per_domain, held_out=True)
        write_jsonl(folder / "held_out.jsonl", interleaved(*(part[:last] for part in unseen)))
        write_jsonl(folder / "test.jsonl", interleaved(*(part[last:] for part in unseen)))
        train_model(self.start, demonstrations, folder / "start", "start")


@dataclass(frozen=True, kw_only=True)
class StringsRecipe(Recipe):
    """Eight skills on words, to learn one after the other, and a model that confuses their names.

    The folder holds train.jsonl (prompts with solutions, and demonstrations as "privileged"),
    held_out.jsonl and test.jsonl (disjoint prompts; held_out is for choosing settings and for
    stopping), told.jsonl (a quarter of the test prompts, with demonstrations), lessons.jsonl (the
    model's training data) and start/ (a Hugging Face folder). A domain is a skill.
    """

    world: ClassVar[str] = "strings"

    version: int = 1  # increase when the texts, the tokenizer or the training change
    prompts_per_domain: int = 1000
    held_out_per_domain: int = 50
    test_per_domain: int = 100
    lessons: int = 32000
    known: float = 0.3  # share of lessons that do what is asked
    start: ModelRecipe = ModelRecipe(
        layers=2, hidden_size=128, steps=500, batch_size=64, learning_rate=4e-3, seed=0
    )

    def __post_init__(self) -> None:
        counts = ("prompts_per_domain", "held_out_per_domain", "test_per_domain", "lessons")
        _check_numbers(self, dict.fromkeys(counts, 1))
        if not 0 <= self.known <= 1:
            raise UserError(f"lab build: known: got {self.known}, expected a share in [0, 1]")

    def make(self, folder: Path) -> None:
        def draw(count: int, *, held_out: bool) -> list[list[strings.Problem]]:
            return [strings.generate(s, count, seed=0, held_out=held_out) for s in strings.SKILLS]

        train = interleaved(*draw(self.prompts_per_domain, held_out=False))
        write_rows(folder / "train.jsonl", map(strings.training_row, train))
        last = self.held_out_per_domain
        unseen = draw(last + self.test_per_domain, held_out=True)
        write_jsonl(folder / "held_out.jsonl", interleaved(*(part[:last] for part in unseen)))
        test = interleaved(*(part[last:] for part in unseen))
        write_jsonl(folder / "test.jsonl", test)
        write_rows(folder / "told.jsonl", map(strings.told, test[: max(1, len(test) // 4)]))
        lessons = folder / "lessons.jsonl"
        write_rows(lessons, strings.lessons(self.lessons, known=self.known, seed=0))
        train_model(self.start, lessons, folder / "start", "start")


def cache_folder() -> Path:
    """Return the folder of all labs: `opd-lightning` in the user's cache folder."""
    return user_cache("lab")


def build(recipe: Recipe, link: Path | None = None) -> Path:
    """Make a lab unless the cache has it.

    The folder holds the files of `Recipe.make` and recipe.json. It appears once complete.

    Args:
        recipe: Recipe of the lab.
        link: Symbolic link to the folder, for configurations to name; replaced if it is a link.
    """
    folder = cache_folder() / f"{recipe.world}-{recipe.digest()}"
    if link is not None:
        check_folder("--link", link.parent)
        if link.exists() and not link.is_symlink():
            raise UserError(f"--link: got {str(link)!r}, which is no link; name another")
    made_once(folder, f"lab build: {folder.name}", partial(_make, recipe))
    if link is not None:
        link.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".link-", dir=link.parent))
        try:
            (draft / "link").symlink_to(folder, target_is_directory=True)
            (draft / "link").replace(link)  # atomic: other processes may do the same
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _make(recipe: Recipe, folder: Path) -> None:
    """Make a lab in an empty folder."""
    recipe.make(folder)
    text = json.dumps(asdict(recipe), indent=2) + "\n"
    (folder / "recipe.json").write_text(text, encoding="utf-8")


def train_model(recipe: ModelRecipe, demonstrations: Path, folder: Path, label: str) -> None:
    """Train a model from scratch with the project's own supervised module."""
    new_model(folder, layers=recipe.layers, hidden_size=recipe.hidden_size, seed=recipe.seed)
    seed_everything(recipe.seed, verbose=False)
    method = SFT(
        Student(str(folder)),
        optimizer=partial(torch.optim.AdamW, lr=recipe.learning_rate),
        lr_scheduler=partial(_warm_up_then_decay, steps=recipe.steps),
    )
    data = RolloutDataModule(
        train=PromptSource(str(demonstrations)),
        mix=RolloutMix(recorded=1),
        prompts_per_step=recipe.batch_size,
        seed=recipe.seed,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=recipe.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[StepProgressBar(label)],
    )
    trainer.fit(method, datamodule=data)
    write_hf_folder(method.student, folder)


def _warm_up_then_decay(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Return a schedule: linear warm-up over a twentieth of the steps, linear decay to a tenth."""
    warm_up = max(1, steps // 20)
    return LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 1 - 0.9 * max(0, step - warm_up) / steps),
    )
