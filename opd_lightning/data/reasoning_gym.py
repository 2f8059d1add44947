"""Prompts of reasoning-gym's tasks, made when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import count
from typing import Any

from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.rows import BadRowError, Row
from opd_lightning.errors import UserError, reason_of

NEEDS = "pip install 'opd-lightning[reasoning-gym]'"


class ReasoningGymPrompts(PromptSource):
    """Questions of procedural tasks, the same for the same settings and version of the library.

    A prompt's `answer` is the whole entry as JSON, for `ReasoningGymVerifier`; `privileged` is the
    reference answer, `response` the same in `<answer>` tags, `domain` the task.

    Args:
        tasks: Settings by task of the library, such as {basic_arithmetic: {max_terms: 3}}.
        size: Number of questions of each task.
        seed: Seed of the questions. Training and validation need different ones.
        system: System message; None for the library's, which asks for `<answer>` tags; an empty
            text for none.
        options: Arguments of `PromptSource` but columns and domains; `limit` is of all tasks in
            turn.
    """

    def __init__(
        self,
        tasks: dict[str, dict[str, Any]],
        *,
        size: int = 500,
        seed: int = 0,
        system: str | None = None,
        **options: Any,
    ) -> None:
        if not tasks or size < 1:
            raise UserError(
                f"ReasoningGymPrompts: got {len(tasks)} tasks of {size} questions, expected at "
                "least one of each"
            )
        name = f"reasoning-gym:{'+'.join(tasks)}"
        super().__init__(name, columns=None, domains=None, **options)
        self.tasks = tasks
        self.size = size
        self.seed = seed
        self.system = system

    @property
    def file(self) -> None:
        return None

    def rows(self, size: int | None) -> Iterator[tuple[int, Row]]:
        """Make the questions, of all tasks in turn."""
        made = {name: _dataset(name, self._settings(name)) for name in self.tasks}
        system = _default_system() if self.system is None else self.system
        first = [{"role": "system", "content": system}] if system else []
        line = count(1)
        for index in range(self.size):
            for name, dataset in made.items():
                yield next(line), self._row(name, index, dataset, first)

    def _settings(self, name: str) -> dict[str, Any]:
        return {**self.tasks[name], "size": self.size, "seed": self.seed}

    def _row(self, name: str, index: int, dataset: Any, first: list[dict[str, str]]) -> Row:
        try:
            entry: Mapping[str, Any] = dataset[index]
            answer = json.dumps({"task": name, "settings": self.tasks[name], "entry": entry})
            _check_score(dataset, entry, json.loads(answer)["entry"])
        except Exception as error:  # the task's code may raise any type
            return BadRowError(f"task {name!r}, question {index}: {reason_of(error, 120)}")
        return {
            "id": f"{name}/{self.seed}/{index}",
            "messages": [*first, {"role": "user", "content": entry["question"]}],
            "answer": answer,
            "privileged": str(entry["answer"]),
            "response": f"<answer>{entry['answer']}</answer>",
            "domain": name,
        }


def _check_score(dataset: Any, entry: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Raise ValueError if the reference answer scores otherwise after JSON has held the entry."""
    before, after = (dataset.score_answer(entry["answer"], one) for one in (entry, read))
    if before != after:
        raise ValueError(f"its scorer needs more than JSON holds: {after} instead of {before}")


def _dataset(name: str, settings: Mapping[str, Any]) -> Any:
    """Return a task; UserError if it is not there or refuses its settings."""
    gym = _library()
    if name not in gym.factory.DATASETS:
        near = get_close_matches(name, gym.factory.DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see its list of tasks"
        raise UserError(f"ReasoningGymPrompts.tasks: the library has no {name!r}; {hint}")
    try:
        return gym.create_dataset(name, **settings)
    except Exception as error:  # checks of a task's settings are assertions, and others
        raise UserError(
            f"ReasoningGymPrompts.tasks: {name!r} refuses its settings: {reason_of(error, 160)}"
        ) from error


def _default_system() -> str:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    return str(SYSTEM_PROMPTS["default"]).strip()


def _library() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise UserError(f"ReasoningGymPrompts: {error}; {NEEDS}") from error
    return reasoning_gym
