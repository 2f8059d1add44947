"""The benchmark against TRL: its arithmetic, its turns, its models, and our side of it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers.__main__ import take_turns
from benchmarks.peers.ours import TakeTurns, train
from benchmarks.peers.ratios import account, compare, ratio, table
from benchmarks.peers.sizes import EOS, GROUPS, SIZES, Tail, make_model, members, write_world
from benchmarks.peers.turns import Side


def step(wall: float, tokens: int = 10, peak: int = 2**30, **stages: float) -> dict[str, Any]:
    return {"wall": wall, "cpu": wall / 2, "tokens": tokens, "peak": peak, "stages": stages}


def test_ratios_are_of_seconds_per_token_by_rounds() -> None:
    # Twice as long per token; the second round is ten times slower for both.
    ours, theirs = [step(1.0), step(20.0, tokens=20)], [step(4.0, tokens=20), step(20.0)]
    assert ratio(theirs, ours, "wall").value == pytest.approx((24 / 30) / (21 / 30))
    even = [step(2.0), step(20.0), step(2.0)]
    found = ratio(even, [step(1.0), step(10.0), step(1.0)], "cpu")
    assert found == pytest.approx((2.0, 2.0, 2.0))
    noisy = ratio([step(2.0), step(3.0), step(4.0)], [step(1.0)] * 3, "wall")
    assert 2.0 <= noisy.low < noisy.value < noisy.high <= 4.0
    with pytest.raises(ValueError, match="pairs"):
        ratio(even, even[1:], "wall")


def test_rows_of_a_size() -> None:
    ours = [step(2.0, generate=1.0, student=0.5), step(4.0, peak=3 * 2**30, generate=2.0)]
    rows = compare({"ours-vllm": ours, "trl": [step(6.0), step(6.0)]}, ["ours-vllm", "absent"])
    assert [row["seconds"] for row in rows] == [3.0, 6.0]
    assert rows[0]["us_per_token"] == {"wall": 3e5, "cpu": 1.5e5}
    assert rows[0]["peak_gib"] == 3.0
    assert rows[0]["stages_us_per_token"] == pytest.approx(
        {"generate": 1.5e5, "student": 2.5e4, "rest": 1.25e5}
    )
    assert rows[1]["ratios"]["ours-vllm"]["wall"].value == pytest.approx(2.0)
    assert rows[1]["ratios"].keys() == {"ours-vllm"}
    lines = table(rows).splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ours-vllm", "| trl"]
    stages = account({"tiny": rows}, "ours-vllm").splitlines()
    assert [line.split(" | ")[0] for line in stages[2:]] == ["| generate", "| student", "| rest"]
    assert account({"tiny": rows}, "trl") == ""


class Recorder:
    """A side that only notes whose turn it is."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def step(self) -> dict[str, Any]:
        self.turns.append(self.name)
        return step(1.0, tokens=len(self.turns))


def test_sides_take_turns_in_changing_order() -> None:
    turns: list[str] = []
    sides: Any = {name: Recorder(name, turns) for name in "ab"}
    steps = take_turns(sides, warm_up=1, ends=0.0)
    assert "".join(turns) == "abbaab"  # one round to warm up, two at least
    assert [[one["tokens"] for one in steps[name]] for name in "ab"] == [[4, 5], [3, 6]]


def test_a_process_takes_turns() -> None:
    side = Side(sys.executable, "tests.turn_taker", "work", environment={})
    side.wait_until_ready()
    steps = [side.step() for _ in range(2)]
    side.stop()
    for step in steps:
        assert (step["tokens"], step["stages"]) == (3, {"sleep": 0.02})
        assert 0.02 <= step["wall"] < 60
        assert 0 <= step["cpu"] < step["wall"] + 1
        assert step["peak"] > 2**20


def test_a_process_that_fails_says_why() -> None:
    side = Side(sys.executable, "tests.turn_taker", "fail", environment={})
    side.wait_until_ready()
    with pytest.raises(RuntimeError, match="a reason"):
        side.step()
    side.stop()


def test_lengths_have_a_tail() -> None:
    means = Tail(median=32, sigma=1.0).means()
    assert means == sorted(means)
    assert (means[3] * means[4]) ** 0.5 == pytest.approx(32)
    assert means[-1] / means[0] > 10


def test_responses_end_at_their_groups_rate() -> None:
    size = SIZES["dry"]
    assert size.tail is not None
    model = make_model(size.student, size, seed=0)
    for group, mean in enumerate(size.tail.means()):
        words = torch.tensor(members(group, size.vocabulary))
        texts = words[torch.randint(len(words), (4, 24))]
        with torch.no_grad():
            probs = model(texts).logits.softmax(-1).mean((0, 1))
        assert probs[EOS] == pytest.approx(1 / mean, rel=0.3)
        assert probs[words].sum() + probs[EOS] > 0.95
    assert len(size.tail.means()) == GROUPS


class StopAfter:
    """Turns that nobody waits for."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.reports: list[tuple[int, dict[str, float]]] = []

    def start(self) -> None:
        pass

    def end(self, tokens: int, stages: dict[str, float]) -> bool:
        self.reports.append((tokens, stages))
        return len(self.reports) < self.steps


def test_our_side(tmp_path: Path) -> None:
    size, turns = SIZES["dry"], StopAfter(2)
    write_world(tmp_path, size)
    train(tmp_path, "dry", "hf", "float32", TakeTurns(turns))
    assert len(turns.reports) == 2
    for tokens, stages in turns.reports:
        assert size.rows < tokens < size.rows * size.response
        for stage in ("generate", "teacher", "student", "head", "backward", "optimizer"):
            assert stages[stage] > 0
        assert "step" not in stages
