"""Engines start for the longest sequence that one stream requests from them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_lightning.data.engines import Engines
from opd_lightning.data.mix import RolloutMix, TeacherSampler
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.evaluation.harness.requests import GenerationRequest
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.evaluation.tasks import HarnessTask
from opd_lightning.models.source import ModelSource
from opd_lightning.preflight.probe import Probe
from opd_lightning.rollouts import HFEngine, Sampling
from opd_lightning.types import Author
from tests.refusals import TEACHER, Refusal, opd

FRAME = 3  # tokens around a message and before the response, in the lab's template
PLAN = Callable[..., tuple[int, int]]


class Planned(HFEngine):
    """Keeps the length that it would start for; 0 if it is not planned."""

    length = 0

    def check(self, source: ModelSource, *, max_length: int) -> None:
        self.length = max_length


@pytest.fixture
def plan(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PLAN:
    """Return the lengths of the student's and the demonstrator's engine.

    Training prompts have 20 tokens, 40 under the privileged view, and those of the suite 60.
    Responses have up to 90 in training, 10 in the suite and 30 of the demonstrator.
    """

    def loads(*_: Any) -> None:
        raise UserError("the set-up is over")

    def run(*, suite: bool = True, **mix: Any) -> tuple[int, int]:
        for name, tokens in (("train", 20), ("suite", 60)):
            row = {"messages": "1" * (tokens - FRAME), "answer": "2", "response": "12"}
            row["privileged"] = "1" * (40 - 20 - (FRAME - 1))
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        student, demonstrator = Planned(), Planned()
        prompts = PromptSource(str(tmp_path / "suite.jsonl"))
        measured = EvaluationSuite(prompts=prompts, sampling=Sampling(max_new_tokens=10))
        monkeypatch.setattr("opd_lightning.models.student.Student.load", loads)
        line = refusal(
            lambda: opd(imitation=1.0),
            path=str(tmp_path / "train.jsonl"),
            engine=student,
            teacher=TeacherSampler(path=TEACHER, engine=demonstrator, max_new_tokens=30),
            mix=RolloutMix(**mix),
            validation={"sums": measured} if suite else {},
            sampling=Sampling(max_new_tokens=90),
            prompts_per_step=4,
        )
        assert line == "the set-up is over"
        return student.length, demonstrator.length

    return run


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ({}, (20 + 90, 0)),
        ({"guided": 0.5}, (40 + 90, 0)),
        ({"teacher": 0.5}, (20 + 90, 20 + 30)),  # no other prompts, nor budgets
        ({"guided": 0.5, "teacher": 0.5}, (40 + 90, 20 + 30)),
        ({"recorded": 1.0}, (60 + 10, 0)),  # only the suite samples
        ({"recorded": 1.0, "suite": False}, (0, 0)),
    ],
)
def test_a_length_is_that_of_one_stream(
    mix: dict[str, Any], expected: tuple[int, int], plan: PLAN
) -> None:
    assert plan(**mix) == expected


def test_a_request_of_a_task_has_its_own_budget() -> None:
    budgets = [(50, 8), (10, 40)]
    requests = [
        GenerationRequest([1] * prompt, Sampling(max_new_tokens=budget), ())
        for prompt, budget in budgets
    ]
    task: Any = HarnessTask(task="any")
    loaded: Any = SimpleNamespace(generation_requests=requests)
    assert task.engine_length(loaded, None) == 58
    loaded.generation_requests = []
    assert task.engine_length(loaded, None) is None


def test_a_suite_that_names_no_length_is_told() -> None:
    engines = Engines(Planned(), None, lambda engine: None)
    with pytest.raises(UserError, match="its engine_length is None, expected the tokens"):
        engines.prepare([Author.STUDENT])


@pytest.mark.parametrize(
    ("length", "budget", "prompts"),
    [
        (0, None, None),  # nothing is requested in the run
        (40, 30, [5, 10]),  # training samples
        (24, 14, [5, 10]),  # only suites do, and their sequences are shorter
        (12, 6, [5, 6]),
    ],
)
def test_a_check_stays_within_the_length(
    length: int, budget: int | None, prompts: list[int] | None
) -> None:
    engines = SimpleNamespace(planned_length=lambda author: length)
    stream: Any = SimpleNamespace(
        prompts=[None, None],
        prompt_ids=[[1] * 5, [1] * 10],
        samples_per_prompt=1,
        order=SimpleNamespace(take=lambda first, count: range(first, count)),
        seed=0,
    )
    data: Any = SimpleNamespace(
        engine=Planned(), engines=engines, sampling=Sampling(max_new_tokens=30)
    )
    module: Any = None
    probe = Probe(module, data, stream, samples=2)
    if budget is None or prompts is None:
        assert probe.engine is None
        return
    assert probe.engine is data.engine
    assert probe.own_sampling.max_new_tokens == budget
    assert [len(request.prompt_ids) for request in probe.requests] == prompts
    assert max(prompts) + budget <= length
    demonstrated = probe._rows(Author.RECORDED)
    assert [len(row.prompt_ids) for row in demonstrated] == [5, 10]
