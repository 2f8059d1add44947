"""Studies: what is missing is trained, exported and measured; what is done is left alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from experiments import work
from experiments.cost import reached
from experiments.figures import curve, logged
from experiments.many_faces import prefixes
from experiments.pictures import digest, draw_claims
from experiments.records import Result, Results, build_of, comparable, read_record, write_record
from experiments.results import (
    BEGIN,
    END,
    SUMMARY,
    T,
    bars,
    cpu_hours,
    interval,
    number,
    picture_of,
    read_results,
    score_tables,
    section,
    spread,
    summary,
    tables,
    verdict,
)
from experiments.study import ROOT, STUDIES, Chain, Claim, Run, Study, read_study
from experiments.tutorial import mistakes
from experiments.work import (
    fit_words,
    locked,
    place_of,
    places,
    run_missing,
    scores_of,
    train_and_measure,
)
from opd_lightning.commands.known_keys import check_keys
from opd_lightning.commands.lightning_cli import OPDCLI
from opd_lightning.errors import UserError
from opd_lightning.lab.arithmetic import generate
from opd_lightning.lab.problems import write_jsonl
from opd_lightning.models.source import ModelSource
from tests import processes

SHORT: dict[str, Any] = {
    "trainer.max_steps": 1,
    "data.prompts_per_step": 4,
    "data.sampling.max_new_tokens": 6,
}
LEARNS = Claim(says="it learns", source="section 1", run="trained", than="start", score="skills")
STUDY = Study(
    name="small",
    world="skills",
    page="docs/small.md",
    seeds=2,
    runs={
        "start": Run(student="lab/skills/start", set={"data.sampling.max_new_tokens": 6}),
        "counted": Run(measure=f"{__name__}.counted", set={"more": 2}),
        "trained": Run(config="configs/lab/experts_sums.yaml", set=SHORT),
        "broken": Run(config="configs/lab/experts_sums.yaml", set={"trainer.max_step": 1}),
        "later": Run(config="configs/lab/experts_sums.yaml", set=SHORT, after=["broken"]),
    },
    claims={"learns": LEARNS},
)


def counted(*, more: int, seed: int) -> dict[str, float]:
    """Measure something."""
    return {"sum": more + seed}


def run_all(work: str) -> None:
    """Exit with what `python -m experiments run` would."""
    raise SystemExit(run_missing(STUDY, [0], "*", Path(work)))


def test_what_is_missing_is_run(untrained_lab: Path, tmp_path: Path) -> None:
    root = tmp_path / "0"
    root.mkdir()
    (root / "lab").symlink_to(untrained_lab / "lab")
    first = processes.call(run_all, str(tmp_path))
    said = first.communicate(timeout=250)[0]
    assert first.returncode == 1
    assert [line.split(":")[1].split()[0] for line in said.splitlines()] == [
        "done",
        "done",
        "done",
        "failed,",
    ]
    assert "broken, seed 0" in said.splitlines()[3]
    assert "max_step" in (root / "scores" / "broken.out").read_text()
    start, measured, trained, broken, later = (
        place_of(STUDY, name, 0, tmp_path) for name in STUDY.runs
    )
    assert start.is_done()
    report = json.loads((root / "scores" / "start.report.json").read_text())
    assert report["suites"]["skills"]["sampling"]["max_new_tokens"] == 6
    assert trained.is_done()
    assert not broken.is_done()
    assert not later.used.exists()  # what it reads is missing
    scores = json.loads(trained.scores.read_text())
    assert scores.keys() == {"skills", "skills/add-3", "skills/program-2"}
    assert json.loads(measured.scores.read_text()) == {"sum": 2}
    assert trained.result().cpu_seconds > 0
    assert 0.1 < (trained.result().memory or 0) < 20  # GiB
    assert (trained.folder / "student" / "config.json").exists()
    assert not (trained.folder / "checkpoints").exists()

    before = trained.scores.stat().st_mtime_ns
    again = processes.call(run_all, str(tmp_path))
    assert "trained" not in again.communicate(timeout=100)[0]
    assert trained.scores.stat().st_mtime_ns == before

    shown = tables(STUDY, comparable(STUDY, read_results(STUDY, [0], tmp_path)))
    assert "| trained | 0.000 | 0.000 | 0.000 | 1 |" in shown
    assert "| run | sum | seeds | CPU minutes | GiB |" in shown
    assert "| counted | 2.000 | 1 |" in shown
    claim = "it learns (trained - start, skills)"
    assert f"| {claim} | section 1 | +0.000 (1 seed) |  | not shown so far |" in shown


def test_texts_are_scored_by_their_log_likelihood() -> None:
    suites = {
        "sums": {"score": 0.5, "domains": {"add-2": {"score": 0.25}}},
        "prose": {"log_likelihood": -2.0, "perplexity": 7.4},
    }
    assert scores_of({"suites": suites}) == {"sums": 0.5, "sums/add-2": 0.25, "prose": -2.0}


def test_a_run_is_worked_on_once(tmp_path: Path) -> None:
    place = place_of(STUDY, "start", 0, tmp_path)
    with locked(place) as first, locked(place) as second:
        assert first
        assert not second
    with locked(place) as third:
        assert third


def test_a_run_goes_on_with_the_settings_that_it_was_begun_with(tmp_path: Path) -> None:
    before = place_of(STUDY, "counted", 0, tmp_path)
    before.scores.parent.mkdir(parents=True)
    before.begun.write_text(before.settings)
    before.scores.write_text('{"sum": 2}')
    assert before.is_done()
    changed = replace(STUDY, runs=STUDY.runs | {"counted": Run(measure=f"{__name__}.counted")})
    now = place_of(changed, "counted", 0, tmp_path)
    assert not now.is_done()
    with pytest.raises(UserError, match=r"counted\.settings: the run was begun with other"):
        train_and_measure(changed, now)


def test_records_are_of_the_present_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Result(60.0, {"skills": 0.25}), Result(80.0, {"skills": 0.5})
    write_record(STUDY, {"a": {"start": {0: first}, "trained": {}}}, tmp_path)
    write_record(STUDY, {"a": {"start": {1: second}}}, tmp_path)
    assert read_record(STUDY, tmp_path)["a"]["start"] == {0: first, 1: second}
    assert read_record(STUDY, tmp_path)["a"]["trained"] == {}

    monkeypatch.setattr(work, "read_record", lambda study: read_record(study, tmp_path))
    monkeypatch.setattr(work, "lab_build", lambda study, seed, work: "a" if seed < 3 else "b")
    missing = places(STUDY, [0, 2, 3], "start", tmp_path)
    assert [place.seed for place in missing] == [2, 3]

    other = replace(STUDY, runs=STUDY.runs | {"start": Run(student="lab/skills/other")})
    assert read_record(other, tmp_path) == {}
    write_record(other, {"a": {"start": {0: second}}}, tmp_path)
    assert read_record(other, tmp_path)["a"]["start"] == {0: second}
    assert read_record(STUDY, tmp_path) == {}


def test_runs_of_one_build_of_the_lab_are_compared() -> None:
    """Of each seed those of the build with the most runs, though another has one more recent."""
    low, high = Result(60.0, {"skills": 0.25}), Result(60.0, {"skills": 0.75})
    more = {"start": {0: low, 1: low}, "trained": {0: high}}
    record = {"a": more, "b": {"trained": {0: low, 1: low, 2: low}}}
    found = comparable(STUDY, record)
    assert found["start"] == {0: low, 1: low}
    assert found["trained"] == {0: high, 2: low}


def test_builds_differ_by_their_weights(tmp_path: Path) -> None:
    assert build_of(tmp_path / "lab") is None
    for name in ("one", "two", "same"):
        (tmp_path / name / "start").mkdir(parents=True)
        (tmp_path / name / "start" / "model.safetensors").write_bytes(name[:1].encode())
    (tmp_path / "same" / "start" / "model.safetensors").write_bytes(b"o")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    one, two, same = (build_of(tmp_path / name) for name in ("one", "two", "same"))
    assert one == same == build_of(tmp_path / "link")
    assert one != two


def test_pages_and_pictures_show_what_is_on_record() -> None:
    assert shown(SUMMARY, "claims") == summary()
    for name in STUDIES:
        study = read_study(name)
        found = comparable(study, read_record(study))
        if any(found.values()):
            assert shown(ROOT / study.page, name) == section(study, found)
        if drawn := bars(study, found):
            assert digest(drawn) in picture_of(study).read_text()
        else:
            assert not picture_of(study).exists()


def test_a_run_that_studies_share_costs_once() -> None:
    own = {"start": {0: Result(cpu_seconds=3600.0, scores={})}}
    more = own | {"trained": {seed: Result(cpu_seconds=1800.0, scores={}) for seed in (0, 1)}}
    other = replace(STUDY, world="strings")
    assert cpu_hours([(STUDY, own), (STUDY, more), (other, own)]) == {"skills": 2.0, "strings": 1.0}


def shown(page: Path, name: str) -> str:
    """Return what is between the marks of a page."""
    return page.read_text().split(BEGIN.format(name=name))[1].split(END)[0].strip()


def test_what_a_run_logged_is_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SummaryWriter(tmp_path / "runs" / "one") as log:
        for step in range(12):
            log.add_scalar("loss", 2 * step, step)
            log.add_scalar("response/tokens_per_step", 100, step)
    monkeypatch.chdir(tmp_path)
    assert logged(run="one", figures={"last": ["loss"]}, steps=[10, 12], seed=0) == {"last": 21.0}
    found = curve(run="one", figures={"loss": "loss"}, seed=0)
    assert found["loss, step 11"] == 22.0
    assert len(found) == 13
    head, _, row = score_tables({"curve": {0: Result(60.0, found, 1.5)}}).splitlines()
    assert "| loss, step 10 | loss, step 11 | tokens | seeds | CPU minutes | GiB |" in head
    assert "| 20.000 | 22.000 | 1,200 | 1 | 1.0 | 1.5 |" in row


def test_a_run_costs_what_it_took_to_reach_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of two rewards reaches 0.5 after three steps of 8 responses, 24 tokens."""
    with SummaryWriter(tmp_path / "runs" / "one") as log:
        for step, reward in enumerate([0.0, 0.6, 0.3, 0.75, 0.9]):
            log.add_scalar("reward", reward, step)
            log.add_scalar("response/tokens_per_step", 24, step)
    (tmp_path / "runs" / "one" / "student").mkdir()
    weights = {"a": torch.zeros(10, 5), "b": torch.zeros(50)}
    save_file(weights, tmp_path / "runs" / "one" / "student" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {"run": "one", "figure": "reward", "window": 2, "samples": 8}
    found = reached(**asked, level=0.5, passes=4, seed=0)
    assert found == {"samples": 24, "tokens": 72, "flops": 2 * 4 * 72 * 100, "reached": 1.0}
    assert reached(**asked, level=0.8, passes=4, seed=0)["samples"] == 32  # with the last value
    assert reached(**asked | {"window": 1}, level=0.75, passes=4, seed=0)["samples"] == 24
    at_once = reached(**asked | {"window": 1}, level=0.0, passes=4, seed=0)
    assert at_once["samples"] == 8  # one step is the least
    assert reached(**asked, level=0.95, passes=4, seed=0)["samples"] == 40  # of the whole run
    assert reached(**asked, level=0.95, passes=4, seed=0)["reached"] == 0.0


def test_large_numbers_are_short() -> None:
    assert [number(n) for n in (0.5, 999, 1234.5, 4.5678e12)] == [
        "0.500",
        "999.000",
        "1,234",
        "4.57e+12",
    ]
    assert number(0.5, "+") == "+0.500"
    assert spread([1000, 3000]) == "2,000 ± 1,414"


def test_pictures_show_claims_that_have_intervals() -> None:
    seeds = {0: Result(60.0, {"skills": 0.25}), 1: Result(60.0, {"skills": 0.5})}
    better = {seed: Result(60.0, {"skills": 0.75}) for seed in seeds}
    empty: Results = {name: {} for name in STUDY.runs}
    found = empty | {"start": seeds, "trained": better}
    (bar,) = bars(STUDY, found)
    assert bar.middle == pytest.approx(0.375)
    assert (bar.low + bar.high) / 2 == pytest.approx(0.375)
    drawn = draw_claims([bar, replace(bar, says="another claim", score="length")])
    assert drawn == draw_claims([bar, replace(bar, says="another claim", score="length")])
    for text in ("it learns", "another claim", "difference of skills", "difference of length"):
        assert f">{text}" in drawn
    assert bars(STUDY, found | {"trained": {0: better[0]}}) == []


def test_a_pattern_takes_what_its_runs_read(tmp_path: Path) -> None:
    chosen = places(STUDY, [3], "lat*", tmp_path)
    assert [(place.name, place.seed) for place in chosen] == [("broken", 3), ("later", 3)]


def test_verdicts() -> None:
    # Mean 2, standard deviation 1, t of 2 degrees of freedom 4.303.
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert verdict(LEARNS, [1.0, 2.0, 3.0]) == "not shown"
    assert verdict(LEARNS, [2.0, 2.1, 2.2]) == "shown"
    assert verdict(LEARNS, [-2.0, -2.1, -2.2]) == "contradicted"
    assert verdict(replace(LEARNS, expects="lower"), [-2.0, -2.1, -2.2]) == "shown"
    assert verdict(LEARNS, [5.0]) == "not shown"
    assert verdict(LEARNS, [0.0, 0.0]) == "not shown"  # no difference is none
    assert verdict(LEARNS, []) == "not measured"
    same = replace(LEARNS, expects="equal", margin=0.1)
    assert verdict(same, [0.01, 0.02, 0.03]) == "shown"  # though its interval may leave out 0
    assert verdict(same, [0.2, 0.0, -0.2]) == "not shown"
    assert verdict(same, [-2.0, -2.1, -2.2]) == "contradicted"
    assert verdict(same, [2.0, 2.1, 2.2]) == "contradicted"


@pytest.mark.parametrize("freedom", range(1, len(T) + 1))
def test_points_of_students_t(freedom: int) -> None:
    """Simpson's rule over the density gives 97.5 % below each of them."""
    half = (freedom + 1) / 2
    scale = math.gamma(half) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    width = T[freedom - 1] / 2000
    heights = [scale * (1 + (i * width) ** 2 / freedom) ** -half for i in range(2001)]
    ends, odd, even = heights[0] + heights[-1], sum(heights[1::2]), sum(heights[2:-1:2])
    below = 0.5 + width / 3 * (ends + 4 * odd + 2 * even)
    assert below == pytest.approx(0.975, abs=5e-5)


def test_more_seeds_than_points_have_the_widest_interval() -> None:
    differences = [float(i % 2) for i in range(20)]
    low, high = interval(differences)
    assert high - low == pytest.approx(2 * T[-1] * stdev(differences) / 20**0.5)


def worked_sums(lab: Path, folder: Path, count: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Write sums; return the arguments that name them, and the tokens of their solutions."""
    problems = generate("add-3", count, seed=0, held_out=True)
    write_jsonl(folder / "test.jsonl", problems)
    tokenizer = ModelSource(str(lab / "lab" / "skills" / "start")).tokenizer
    solutions = [tokenizer(p.solution, add_special_tokens=False).input_ids for p in problems]
    return {"prompts": str(folder / "test.jsonl"), "domain": "add-3", "seed": 0}, solutions


def test_a_teacher_finishes_what_another_began(
    untrained_lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First halves of solutions are the writer's, the rest the teacher's, wrong every second."""
    asked_sums, whole = worked_sums(untrained_lab, tmp_path, 20)
    start = str(untrained_lab / "lab" / "skills" / "start")
    half = [len(ids) // 2 for ids in whole]

    def responses(path: str, asked: list[list[int]], seed: int, turn: int) -> list[list[int]]:
        if path == "writer":
            return whole
        assert all(a[-n:] == ids[:n] for a, ids, n in zip(asked, whole, half, strict=True))
        ends = [ids[n:] for ids, n in zip(whole, half, strict=True)]
        return [ids if i % 2 else ids[:-1] for i, ids in enumerate(ends)]

    monkeypatch.setattr(prefixes, "responses", responses)
    found = prefixes.finished(teacher=start, writer="writer", share=0.5, **asked_sums)
    assert found == {"solved": 0.5, "right": 1.0, "solved_after_right": 0.5}


def test_where_the_first_mistake_is(
    untrained_lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four responses one is right, one wrong at 3, one too short by 2, one too long by 1."""
    asked_sums, (right, wrong, short, long) = worked_sums(untrained_lab, tmp_path, 4)
    start = str(untrained_lab / "lab" / "skills" / "start")
    ends = [len(short) - 2, len(long)]
    wrong[3] += 1
    written = [right, wrong, short[:-2], [*long, 0]]
    monkeypatch.setattr(mistakes, "responses", lambda *_: written)

    def share(begin: int, end: int) -> float:
        found = mistakes.first_mistakes(student=start, positions=(begin, end), **asked_sums)
        return found["mistakes"]

    assert share(0, 3) == share(4, min(ends)) == 0.0
    assert share(3, 4) == 0.25
    assert share(4, max(ends) + 1) == 0.5
    assert share(max(ends), max(ends) + 1) == 0.25


def test_a_chain_trains_the_student_of_the_run_before() -> None:
    chain = Chain(config="c.yaml", links=[{"a": 1}, {"a": 2}, {}], set={"a": 0}, after=["start"])
    runs = chain.runs("sft")
    assert [*runs] == ["sft-1", "sft-2", "sft-3"]
    assert runs["sft-1"] == Run(config="c.yaml", set={"a": 1}, after=["start"])
    before = {"model.student.path": "runs/sft-1/student"}
    assert runs["sft-2"] == Run(config="c.yaml", set={"a": 2, **before}, after=["start", "sft-1"])
    assert runs["sft-3"].set == {"a": 0, "model.student.path": "runs/sft-2/student"}
    assert read_study("sequence").runs["sft-8"].after == ["sft-7"]


def test_another_recipe_of_a_lab_is_another_setting_of_the_runs_that_read_it() -> None:
    runs = {"small": Run(student="lab/small/start"), "start": STUDY.runs["start"]}
    one = replace(STUDY, runs=runs, claims={}, labs={"small": ["--skills.start.layers=1"]})
    two = replace(one, labs={"small": ["--skills.start.layers=2"]})
    assert one.settings("small") != two.settings("small")
    assert one.settings("start") == two.settings("start") == STUDY.settings("start")


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_are_whole(name: str) -> None:
    study = read_study(name)
    root = Path(__file__).parents[2]
    files = {study.test, study.page, *(run.config for run in study.runs.values() if run.config)}
    assert [file for file in sorted(files) if not (root / file).is_file()] == []
    assert study.claims


def test_runs_of_a_name_are_the_same_in_all_studies_of_a_world() -> None:
    """Compare their test suites too, since the scores of a run are shared."""
    seen: dict[tuple[str, str], tuple[Run, str]] = {}
    for name in STUDIES:
        study = read_study(name)
        for label, run in study.runs.items():
            whole = run, study.test
            assert seen.setdefault((study.world, label), whole) == whole


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({"a": Run(student="s", after=["b"])}, "run a: after: no earlier run is b"),
        ({"a": Run()}, "run a: give one of config"),
        ({"start": Run(student="s")}, "claim learns: no run is trained"),
    ],
)
def test_mistakes_are_named(runs: dict[str, Run], said: str) -> None:
    with pytest.raises(UserError, match=f"small: {said}"):
        replace(STUDY, runs=runs)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in STUDIES])
def test_every_run_of_a_study_is_accepted(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, subcommand: None)
    if name in ("skill", "other_tokens"):
        pytest.importorskip("reasoning_gym")
    for words in commands(name, tmp_path):
        assert OPDCLI(words).model.student.model is None
    OPDCLI(["test", "--config", read_study(name).test]).datamodule.sampling.check_temperature()


@pytest.mark.parametrize("name", STUDIES)
def test_the_options_of_a_study_exist(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    for words in commands(name, tmp_path):
        check_keys("fit", words[1:])


def commands(name: str, work: Path) -> list[list[str]]:
    """Return the command lines that train the runs of a study."""
    study = read_study(name)
    runs = {label: run for label, run in study.runs.items() if run.config}
    return [fit_words(run, place_of(study, label, 0, work)) for label, run in runs.items()]
