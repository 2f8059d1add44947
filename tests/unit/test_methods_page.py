"""docs/methods.md: every row of its tables is a method that can be built, and they are counted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_lightning import methods, rollouts, rules, teachers, verifiers
from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.views import PromptView
from opd_lightning.losses import divergence, schedule, surrogate, target, top_k
from opd_lightning.methods import DistillationModule
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.run.method_checks import check_truncation
from opd_lightning.verifiers.weighted import Part

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text()
CLASSES = {
    name: value
    for module in (
        methods,
        rules,
        teachers,
        rollouts,
        verifiers,
        divergence,
        schedule,
        surrogate,
        target,
        top_k,
    )
    for name, value in vars(module).items()
    if isinstance(value, type)
}
DATA = ("mix", "sampling", "samples_per_prompt")
TYPES = {"mix": RolloutMix, "sampling": Sampling, "surrogate": surrogate.Surrogate}
EACH = {"data.views": PromptView, "parts": Part}  # mappings of names to arguments of a class


def table(heading: str) -> list[list[str]]:
    """Return the cells of the rows below a heading's first table."""
    (_, text) = PAGE.split(heading, 1)
    lines = [line for line in text.split("\n#")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


METHODS = table("# Methods\n")
VARIANTS = table("## Variants as rules\n")


def built(value: Any) -> Any:
    """Return the object of `Name`, or of {class_path: Name, ...}; other values as they are."""
    if isinstance(value, list):
        return [built(item) for item in value]
    if isinstance(value, Mapping):
        given = {key: built(item) for key, item in value.items() if key != "class_path"}
        for key in EACH.keys() & given.keys():
            given[key] = {name: EACH[key](**one) for name, one in given[key].items()}
        return CLASSES[value["class_path"]](**given) if "class_path" in value else given
    if isinstance(value, str) and re.fullmatch(r"\d+e-\d+", value):
        return float(value)  # YAML 1.1, unlike the configuration's parser, takes it for a text
    return CLASSES[value]() if isinstance(value, str) and value in CLASSES else value


def settings(cell: str) -> tuple[str, dict[str, Any]]:
    """Return the method and the other settings of a row, objects built."""
    name, *rest = re.findall(r"`([^`]+)`", cell)
    found: dict[str, Any] = {}
    for span in rest:
        # The page's short form of a class with arguments.
        full = re.sub(r"\b([A-Z]\w*) \{", r"{class_path: \1, ", span)
        (key, value), *more = yaml.safe_load(full).items()
        assert not more, span
        found |= {key: TYPES[key](**value)} if key in TYPES else built({key: value})
    return name, found


def run_of(cell: str) -> tuple[DistillationModule, RolloutDataModule]:
    """Build the method and the data of a row; models are folders that need not be there."""
    name, found = settings(cell)
    data = {key.removeprefix("data."): found.pop(key) for key in [*found]
            if key in DATA or key.startswith("data.")}  # fmt: skip
    if "teacher" in data:
        sampling = data["teacher"].pop("sampling", None)
        given = data["teacher"] | ({} if sampling is None else {"sampling": Sampling(**sampling)})
        data["teacher"] = TeacherSampler(engine=HFEngine(), **given)
    kind = CLASSES[name]
    for role, parameter in signature(kind).parameters.items():
        if role == "teacher" and parameter.default is Parameter.empty:
            found.setdefault(role, teachers.FrozenTeacher("teacher"))
    if kind in (methods.GOPD, methods.SGOPD):
        found.setdefault("reference", teachers.FrozenTeacher("start"))
    return kind(Student("start"), **found), RolloutDataModule(**data)


@pytest.mark.parametrize("cell", [pytest.param(cell, id=paper) for paper, cell, _ in VARIANTS])
def test_a_row_is_a_run_whose_parts_fit(cell: str) -> None:
    method, data = run_of(cell)
    method.check()
    assert not method.needs_groups or data.samples_per_prompt > 1
    foreign = data.mix.teacher or data.mix.reads_records
    assert not foreign or method.takes_demonstrations
    assert not method.needs_demonstrations or not data.mix.samples
    assert bool(data.mix.teacher) == (data.teacher is not None)
    assert method.views() <= data.views.keys()
    assert data.user_views <= method.views()
    check_truncation(method, data)


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row[0])
def test_a_method_of_the_first_table_has_a_class_and_a_configuration(row: list[str]) -> None:
    classes = re.findall(r"`(\w+)`", row[1])
    assert isinstance(CLASSES[classes[0]], type)
    for name in re.findall(r"`([\w/]+\.yaml)`", row[2]):
        assert (ROOT / "configs" / name).is_file()


def test_rows_are_counted() -> None:
    (stated,) = re.findall(r"configuration exist: (\d+) methods", PAGE)
    assert int(stated) == len(METHODS) + len(VARIANTS)
    names = [row[0] for row in VARIANTS]
    assert len(set(names)) == len(names)
    assert all(len(row) == 3 for row in VARIANTS)


def test_nothing_says_that_an_existing_class_is_missing() -> None:
    (missing,) = re.findall(r"\*\*Not implemented\.\*\*(.*?)\n\n", PAGE, re.DOTALL)
    named = set(re.findall(r"\b[A-Z]\w+\b", missing))
    assert not named & CLASSES.keys() - {"OPD"}


def test_configurations_of_papers_are_named() -> None:
    folders = [ROOT / "configs" / name for name in ("recipes", "papers")]
    shipped = {str(p.relative_to(ROOT)) for folder in folders for p in folder.glob("*.yaml")}
    assert shipped == set(re.findall(r"`(configs/(?:recipes|papers)/\w+\.yaml)`", PAGE))


def test_defaults_of_the_normaliser_are_named() -> None:
    (named,) = re.findall(r"`token-mean` is the default except in (.*?), where", PAGE, re.DOTALL)
    defaults = {
        name: signature(kind).parameters["aggregation"].default
        for name, kind in vars(methods).items()
        if isinstance(kind, type) and "aggregation" in signature(kind).parameters
    }
    other = {name for name, mode in defaults.items() if mode != "token-mean"}
    assert other == set(re.findall(r"`(\w+)`", named))
    assert {defaults[name] for name in other} == {"seq-mean-token-mean"}
