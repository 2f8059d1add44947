"""`opd lab`: a small lab is built once, whole or not at all, and the demonstration runs on it."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from opd_lightning.cli import main
from opd_lightning.errors import UserError
from opd_lightning.lab import build as build_module
from opd_lightning.lab import demo as demo_module
from opd_lightning.lab.build import (
    ArithmeticRecipe,
    IdentityRecipe,
    ModelRecipe,
    Recipe,
    SkillsRecipe,
    build,
)
from opd_lightning.lab.demo import evaluate

ROOT = Path(__file__).parents[2]


def model(layers: int, steps: int) -> ModelRecipe:
    return ModelRecipe(
        layers=layers, hidden_size=32, steps=steps, batch_size=16, learning_rate=5e-3, seed=layers
    )


SMALL = ArithmeticRecipe(
    domains=("add-2", "sub-2"),
    prompts_per_domain=64,
    held_out_per_domain=4,
    teacher=model(2, steps=30),
    student=model(1, steps=2),
)
SHORT = {
    "max_steps": 2, "val_check_interval": 1, "prompts_per_step": 16, "max_new_tokens": 16
}  # fmt: skip
SMALL_IDENTITY = IdentityRecipe(lessons=64, base=model(1, steps=2))
SMALL_SKILLS = SkillsRecipe(
    prompts_per_domain=16, held_out_per_domain=4, test_per_domain=5, start=model(1, steps=2)
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "opd-lightning" / "lab"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which `SMALL` is built once."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def with_small(kept: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))


@pytest.mark.usefixtures("with_small")
def test_build_is_cached_by_recipe(tmp_path: Path) -> None:
    link = tmp_path / "lab" / "arithmetic"
    folder = build(SMALL, link)
    assert link.resolve() == folder
    assert {p.name for p in folder.iterdir()} == {
        "train.jsonl", "held_out.jsonl", "demonstrations.jsonl", "recipe.json", "teacher", "student"
    }  # fmt: skip
    stamp = (folder / "recipe.json").stat().st_mtime_ns
    assert build(SMALL, link) == folder
    assert (folder / "recipe.json").stat().st_mtime_ns == stamp
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["teacher"]["steps"] == 30
    scores = evaluate(link / "teacher", link / "held_out.jsonl")
    assert scores.keys() >= {"score", "score/add-2", "score/sub-2", "length", "truncated"}


def test_the_identity_world_from_the_command_line(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [f"--identity.base.{key}={value}" for key, value in vars(SMALL_IDENTITY.base).items()]
    main(["lab", "build", "--world", "identity", "--identity.lessons", "64", *base])
    link = tmp_path / "lab" / "identity"
    folder = cache / f"identity-{SMALL_IDENTITY.digest()}"
    assert link.resolve() == folder
    assert capsys.readouterr().out.split()[-1] == str(folder)
    prompts = ("lessons", "train", "demonstrations", "identity", "persona", "held_out")
    assert {p.name for p in folder.iterdir()} == {
        *(f"{name}.jsonl" for name in prompts), "recipe.json", "base"
    }  # fmt: skip
    assert json.loads((folder / "recipe.json").read_text())["base"]["steps"] == 2
    assert (folder / "base" / "model.safetensors").is_file()


def test_the_skills_world_has_disjoint_prompts_of_both_domains(cache: Path) -> None:
    folder = build(SMALL_SKILLS)
    sizes = {"train": 16, "held_out": 4, "test": 5}
    assert {p.name for p in folder.iterdir()} == {
        *(f"{name}.jsonl" for name in (*sizes, "demonstrations")), "recipe.json", "start"
    }  # fmt: skip
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in sizes
    }
    for name, count in sizes.items():
        assert [row["domain"] for row in rows[name]] == ["add-3", "program-2"] * count
    assert len({row["id"] for name in sizes for row in rows[name]}) == 2 * sum(sizes.values())


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--identity.lessons=5"], "--identity, of the identity world, with --world arithmetic"),
        (["--world=identity", "--recipe.prompts_per_domain=5"], "--recipe, of the arithmetic"),
        (["--world=identity", "--skills.version=5"], "--skills, of the skills world"),
    ],
)
def test_a_recipe_of_the_other_world_is_refused(
    cache: Path, capsys: pytest.CaptureFixture[str], args: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lab", "build", *args])
    assert ended.value.code == 2
    assert line in capsys.readouterr().err
    assert not cache.exists()


def test_the_help_lists_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lab", "build", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--recipe.teacher.steps" in shown
    assert "--identity.base.steps" in shown
    assert "--skills.start.steps" in shown


def test_the_recipe_names_the_folder() -> None:
    assert SMALL.digest() == ArithmeticRecipe(**vars(SMALL)).digest()
    assert SMALL.digest() != ArithmeticRecipe().digest()
    assert SMALL_IDENTITY.digest() != IdentityRecipe().digest()
    assert SMALL_SKILLS.digest() != SkillsRecipe().digest()


@pytest.mark.parametrize("recipe", [SMALL, SMALL_IDENTITY, SMALL_SKILLS])
def test_an_interrupted_build_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "train_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(recipe)
    assert not [path for path in cache.iterdir() if not path.name.endswith(".lock")]


@dataclass(frozen=True, kw_only=True)
class SlowRecipe(Recipe):
    world = "slow"

    def make(self, folder: Path) -> None:
        time.sleep(0.5)
        (folder / "made").touch()
        MADE.append(folder)


MADE: list[Path] = []


def test_three_at_once_make_one(cache: Path, tmp_path: Path) -> None:
    MADE.clear()
    link = tmp_path / "lab" / "slow"
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: build(SlowRecipe(), link), range(3)))
    assert len(MADE) == len(folders) == 1
    assert link.resolve() == folders.pop()
    assert {path.name for path in link.iterdir()} == {"made", "recipe.json"}
    assert [path.name for path in link.parent.iterdir()] == ["slow"]


def test_what_is_at_the_link_s_place_is_not_removed(cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.write_text("kept")
    for link in (place, place / "below"):
        with pytest.raises(UserError, match="--link"):
            build(SlowRecipe(), link)
    assert place.read_text() == "kept"
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        build(SlowRecipe())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", 0),
        ("hidden_size", -32),
        ("steps", -1),
        ("steps", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
    ],
)
def test_numbers_of_a_recipe_are_checked(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        replace(model(1, 2), **{name: value})  # type: ignore[arg-type]


def test_counts_of_a_recipe_are_checked() -> None:
    with pytest.raises(UserError, match="lessons"):
        IdentityRecipe(lessons=0)
    with pytest.raises(UserError, match="held_out_per_domain"):
        ArithmeticRecipe(held_out_per_domain=0)


@pytest.mark.usefixtures("with_small")
def test_the_demonstration_from_end_to_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two steps."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    config = tmp_path / "configs" / "lab" / "opd_full_vocabulary.yaml"
    text = config.read_text()
    for setting, value in SHORT.items():
        text, found = re.subn(rf"\b{setting}: \d+", f"{setting}: {value}", text)
        assert found == 1, setting
    config.write_text(text)
    monkeypatch.setattr(demo_module, "ArithmeticRecipe", lambda: SMALL)
    main(["lab", "demo", "--run", "runs/small", "--require", "0"])
    shown = capsys.readouterr().out
    assert "engine: Hugging Face generate" in shown
    assert "student before" in shown
    assert "sub-2" in shown
    assert (tmp_path / "runs" / "small" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs" / "small" / "student" / "model.safetensors").is_file()

    with pytest.raises(SystemExit) as ended:
        main(["lab", "demo", "--run", "runs/small"])
    assert ended.value.code == 2
    assert "run folder 'runs/small' exists" in capsys.readouterr().err

    monkeypatch.setattr(demo_module, "vllm_unavailable", lambda: "vLLM is not installed")
    with pytest.raises(SystemExit):
        main(["lab", "demo", "--run", "runs/other", "--engine", "vllm"])
    assert "--engine: got vllm, but vLLM is not installed" in capsys.readouterr().err
    assert not Path("runs/other").exists()
