"""Check classes of the user before weights load: arguments of methods, and teachers they hold."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Parameter, getattr_static, isfunction, signature
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Engine
from opd_lightning.rules.base import Rule
from opd_lightning.rules.terms import Term
from opd_lightning.teachers.base import DistributionTeacher, Teacher, TopKTeacher
from opd_lightning.training.callback import RunCallback
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.training.contract import Contract
from opd_lightning.verifiers.base import Verifier

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

BASES = (
    Contract,
    ComposedMethod,
    Rule,
    Term,
    Teacher,
    TopKTeacher,
    DistributionTeacher,
    Verifier,
    Engine,
    RunCallback,
)


def check_part_classes(
    module: DistillationModule, data: RolloutDataModule, trainer: Trainer
) -> None:
    """Raise UserError at the first method of a part of the run that cannot be called.

    In training the mistake would be known only after the models are loaded.
    """
    for part in _parts(module, data, trainer):
        for base in BASES:
            if isinstance(part, base):
                _check_methods(part, base)


def check_held_teachers(teacher: Teacher) -> None:
    """Raise UserError if a teacher has others whose models no check sees, as `parts` lacks them."""
    known = teacher.parts()
    for part in {teacher, *known}:
        for name, value in vars(part).items() if part.source is None else ():
            held = [*value.values()] if isinstance(value, dict) else value
            for one in held if isinstance(held, list | tuple) else [held]:
                if isinstance(one, Teacher) and not {*one.parts()} <= {*known}:
                    raise UserError(
                        f"{type(part).__name__}.parts: got no {type(one).__name__}, which it has "
                        f"as {name!r}, so that its tokenizer would not be compared with the "
                        f"student's; return the `parts()` of all of its teachers"
                    )


def _parts(
    module: DistillationModule, data: RolloutDataModule, trainer: Trainer
) -> Iterator[object]:
    yield module
    if isinstance(module, ComposedMethod):
        yield from module.rules
        yield from module.terms
    for teacher in module.teachers():
        yield from {teacher: None, **dict.fromkeys(teacher.parts())}
    yield from (data.engine, data.verifier)
    yield from trainer.callbacks  # type: ignore[attr-defined]


def _check_methods(part: object, base: type) -> None:
    """Raise UserError if a method of `base` that `part` overrides takes other arguments."""
    for name, ours in vars(base).items():
        theirs = getattr_static(type(part), name, ours)
        if name.startswith("_") or theirs is ours or not (isfunction(ours) and isfunction(theirs)):
            continue
        expected = [*signature(ours).parameters.values()][1:]
        given = [p.name for p in expected if p.kind <= Parameter.POSITIONAL_OR_KEYWORD]
        needed = [p for p in given if signature(ours).parameters[p].default is Parameter.empty]
        by_name = [p.name for p in expected if p.kind is Parameter.KEYWORD_ONLY]
        try:
            signature(theirs).bind(part, *needed, **dict.fromkeys(by_name))
        except TypeError as error:
            arguments = ", ".join(["self", *given, *(f"{name}=..." for name in by_name)])
            raise UserError(
                f"{type(part).__name__}.{name}: {error}; it is called as "
                f"{name}({arguments}), as in {base.__name__}; change its arguments"
            ) from error
