"""Tasks of reasoning-gym: prompts that are made, and scores by the tasks' own scorers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from opd_lightning.data.reasoning_gym import ReasoningGymPrompts
from opd_lightning.errors import UserError
from opd_lightning.types import Prompt
from opd_lightning.verifiers.reasoning_gym import ReasoningGymVerifier, score

gym = pytest.importorskip("reasoning_gym")

TASKS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2},
    "countdown": {},  # many answers are right: the scorer evaluates the expression
}


def prompts(seed: int = 0, **more: Any) -> list[Prompt]:
    return ReasoningGymPrompts(TASKS, size=4, seed=seed, **more).load()


def test_prompts_are_those_of_the_library_and_depend_on_the_seed() -> None:
    made = prompts()
    assert [p.domain for p in made] == ["basic_arithmetic", "countdown"] * 4
    expected = gym.create_dataset("countdown", size=4, seed=0)[3]
    assert made[-1].messages[-1] == {"role": "user", "content": expected["question"]}
    assert made[-1].privileged == expected["answer"]
    assert made[-1].response == f"<answer>{expected['answer']}</answer>"
    assert "<answer>" in made[0].messages[0]["content"]
    assert made == prompts()
    assert {p.id for p in made}.isdisjoint(p.id for p in prompts(seed=1))
    assert [m["role"] for m in prompts(system="")[0].messages] == ["user"]
    assert len(prompts(limit=3)) == 3


def test_the_task_scores_what_stands_in_the_tags() -> None:
    for prompt in prompts():
        assert prompt.answer is not None
        assert score(prompt.answer, f"so <answer>{prompt.privileged}</answer>") == 1.0
        assert score(prompt.answer, str(prompt.privileged)) == 0.0
        assert score(prompt.answer, "<answer>no</answer>") < 1.0
    assert prompt.answer is not None
    numbers = json.loads(prompt.answer)["entry"]["metadata"]["numbers"]
    wrong = score(prompt.answer, f"<answer>{'+'.join(map(str, numbers))}+1</answer>")
    assert 0 <= wrong < 1


def test_responses_are_scored_in_workers() -> None:
    verifier = ReasoningGymVerifier(max_workers=1)
    made = prompts()[:2]
    verifier.check(made)
    try:
        right = [f"<answer>{p.privileged}</answer>" for p in made]
        assert verifier.verify(made, right) == [1.0, 1.0]
        assert verifier.verify(made[:1], ["no tags"]) == [0.0]
    finally:
        verifier.close()


def test_other_prompts_are_refused() -> None:
    verifier = ReasoningGymVerifier()
    for answer in (None, "4", "[]", '{"task": "countdown"}'):
        with pytest.raises(UserError, match="ReasoningGymPrompts"):
            verifier.check([Prompt(id="1", messages=(), answer=answer)])


@pytest.mark.parametrize(
    ("tasks", "line"),
    [
        ({}, "got 0 tasks"),
        ({"countdwn": {}}, "did you mean 'countdown'"),
        ({"countdown": {"min_numbers": -5}}, "refuses its settings"),
        ({"countdown": {"numbers": 3}}, "refuses its settings"),
    ],
)
def test_mistakes(tasks: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        ReasoningGymPrompts(tasks).load()


def test_every_task_s_entries_survive_json() -> None:
    """What JSON would change is refused by name, not scored otherwise."""
    refused = []
    for name in ("graph_color", "sudoku", "letter_counting", "maze", "zebra_puzzles"):
        try:
            made = ReasoningGymPrompts({name: {}}, size=1).load()
        except UserError as error:
            refused.append(str(error))
            continue
        assert not math.isnan(score(made[0].answer or "", "<answer>1</answer>"))
    assert all("scorer needs more than JSON" in line or "JSON" in line for line in refused)
