"""Mixtures of prompt sources, and data sets of the hub."""

import json
from collections import Counter
from inspect import signature
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from jsonargparse import ArgumentError, ArgumentParser

from opd_lightning.commands.signatures import find
from opd_lightning.data import hub_prompts
from opd_lightning.data.hub_prompts import HubPrompts
from opd_lightning.data.mixtures import MixedPrompts
from opd_lightning.data.prompt_files import RECORD, PromptFiles
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.reasoning_gym import ReasoningGymPrompts
from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Linear, Schedule
from tests.unit.test_prompt_files import ALONE


def write(folder: Path, count: int, **columns: str) -> PromptSource:
    folder.mkdir()
    rows = [json.dumps({"prompt": f"{i}+1=", **columns}) for i in range(count)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return PromptSource(str(folder / "train.jsonl"))


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, PromptSource]:
    """Two files of one name; the rows of the second have a domain."""
    return {"maths": write(tmp_path / "a", 6), "code": write(tmp_path / "b", 2, domain="python")}


def mixture(sources: dict[str, PromptSource], **more: Any) -> MixedPrompts:
    return MixedPrompts(sources, **more)


def test_sources_are_read_together(sources: dict[str, PromptSource]) -> None:
    prompts = mixture(sources).load()
    assert [p.id for p in prompts[5:7]] == ["maths/train:6", "code/train:1"]
    assert Counter(p.domain for p in prompts) == {"maths": 6, "python": 2}
    assert sorted(mixture(sources).order(prompts, 4, seed=0).take(0, 8)) == list(range(8))


@pytest.mark.parametrize(
    ("by", "shares"),
    [
        ("source", {"maths": 0.25, "code": 0.75}),
        ("domain", {"maths": 1.0, "python": Linear(start=3.0, end=3.0, steps=9)}),
    ],
)
def test_steps_have_their_shares(
    by: Any, shares: dict[str, float | Schedule], sources: dict[str, PromptSource]
) -> None:
    mixed = mixture(sources, shares=shares, by=by)
    prompts = mixed.load()
    order = mixed.order(prompts, 4, seed=0)
    for step in range(5):
        taken = [prompts[i].domain for i in order.take(4 * step, 4)]
        assert Counter(taken) == {"maths": 1, "python": 3}


def test_what_is_mixed_is_recorded_by_its_parts(
    sources: dict[str, PromptSource], tmp_path: Path
) -> None:
    def read(resumes: bool) -> int:
        files = PromptFiles(tmp_path / "run", resumes=resumes)
        files.agree({"data.train": mixture(sources)}, ALONE)
        return len(mixture(sources).load(files.size))

    assert read(resumes=False) == 8
    recorded = json.loads((tmp_path / "run" / RECORD).read_text())
    assert recorded.keys() == {"data.train.sources.maths", "data.train.sources.code"}
    with Path(sources["code"].path).open("a") as file:
        file.write('\n{"prompt": "9+9="}\n')
    assert read(resumes=True) == 8  # what was appended is left to the next run
    Path(sources["code"].path).write_text('{"prompt": "another"}\n')
    with pytest.raises(UserError, match=r"data\.train\.sources\.code"):
        read(resumes=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": {"maths": 1.0}}, "got none for 'code', expected those of every source"),
        ({"shares": {"maths": 1.0, "code": 1.0, "x": 1.0}}, "got one for 'x'"),
        ({"shares": {"maths": 1.0, "code": 1.0}, "by": "domain"}, "got one for 'code'"),
        ({"shares": {"maths": 0.0, "code": 0.0}}, "shares: all are 0"),
    ],
)
def test_shares_name_what_there_is(
    settings: dict[str, Any], message: str, sources: dict[str, PromptSource]
) -> None:
    with pytest.raises(UserError, match=message):
        mixture(sources, **settings).load()


def test_a_mixture_of_nothing_or_of_mixtures(sources: dict[str, PromptSource]) -> None:
    with pytest.raises(UserError, match="got none"):
        MixedPrompts({})
    with pytest.raises(UserError, match="no mixture"):
        MixedPrompts({"all": mixture(sources)})


def test_a_configuration_names_them(sources: dict[str, PromptSource]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptSource, "train")
    hub = {"class_path": "opd_lightning.data.hub_prompts.HubPrompts", "init_args": {"name": "o/d"}}
    linear = {
        "class_path": "opd_lightning.losses.schedule.Linear",
        "init_args": {"start": 1.0, "end": 0.0, "steps": 3},
    }
    settings = {
        "class_path": "opd_lightning.data.mixtures.MixedPrompts",
        "init_args": {
            "sources": {"maths": {"path": sources["maths"].path}, "hub": hub},
            "shares": {"maths": 1.0, "hub": linear},
        },
    }
    train = parser.instantiate(parser.parse_object({"train": settings})).train
    assert [type(source) for source in train.sources.values()] == [PromptSource, HubPrompts]
    assert train.shares == {"maths": 1.0, "hub": Linear(start=1.0, end=0.0, steps=3)}


# The hub ---------------------------------------------------------------------------------------


def test_rows_of_the_hub_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs["split"], kwargs["revision"]))
        return Dataset.from_list([{"question": "1+1=", "answer": 2}, {"question": "2+2="}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub_prompts, "hub_unavailable", lambda: None)
    source = HubPrompts("o/d", subset="main", revision="abc", columns={"messages": "question"})
    one, other = source.load()
    assert (one.answer, other.answer, other.id) == ("2", None, "train:2")
    assert one.origin == "hub:o/d/main/train:1"
    assert asked == [(("o/d", "main"), "train", "abc")]


def test_without_a_network_the_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub_prompts, "hub_unavailable", lambda: "HF_HUB_OFFLINE is set")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def gone(*args: Any, **kwargs: Any) -> Dataset:
        assert kwargs["download_config"].local_files_only
        raise ConnectionError("Couldn't reach 'o/d' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(UserError) as caught:
        HubPrompts("o/d").load()
    (line,) = str(caught.value).splitlines()
    assert "HF_HUB_OFFLINE is set, and it is not in the cache" in line


def test_what_is_no_file_is_not_recorded(tmp_path: Path) -> None:
    made = ReasoningGymPrompts({"countdown": {}})
    files = PromptFiles(tmp_path)
    files.agree({"data.train": MixedPrompts({"made": made, "hub": HubPrompts("o/d")})}, ALONE)
    assert json.loads((tmp_path / RECORD).read_text()) == {}
    assert files.size(made) is None


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "rows.jsonl here"])
def test_a_name_is_one_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=r"HubPrompts\.name"):
        HubPrompts(name)


def test_a_folder_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gsm8k").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"read with train\.path"):
        HubPrompts("gsm8k")


@pytest.mark.parametrize(
    ("path", "own", "left"),
    [
        ("hub_prompts.HubPrompts", {"name": "o/d"}, set()),
        ("reasoning_gym.ReasoningGymPrompts", {"tasks": {"countdown": {}}}, {"columns", "domains"}),
    ],
)
def test_other_sources_have_the_options_of_a_file(
    path: str, own: dict[str, Any], left: set[str]
) -> None:
    """With their types and texts, in configurations and in the help that reads the source."""
    path = f"opd_lightning.data.{path}"
    shared = signature(PromptSource).parameters.keys() - {"path"} - left
    kind = find(path)
    assert kind is not None
    options = (kind.options() or {}).keys()
    assert shared | own.keys() <= options
    assert not ({"path"} | left) & options
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptSource, "train")
    given = {"class_path": path, "init_args": {**own, "limit": 3}}
    known = parser.parse_object({"train": given}).train.init_args
    assert shared <= set(known.keys())
    assert not left & set(known.keys())
    assert (known.limit, known.on_bad_row) == (3, "error")
    for wrong in ({"limit": "many"}, {"on_bad_row": "guess"}, {"path": "x"}):
        init = {**own, **wrong}
        with pytest.raises(ArgumentError):
            parser.parse_object({"train": {"class_path": path, "init_args": init}})
