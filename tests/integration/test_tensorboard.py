"""TensorBoard's data of a run that resumed from an older checkpoint, over HTTP."""

import json
import re
import time
from pathlib import Path
from shutil import copytree
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from opd_lightning.cli import main
from tests.comparing import scalars, tensors
from tests.full_run import CONFIG, RUN, settings
from tests.metrics_page import unlisted
from tests.tensorboard_server import tensorboard

STEPS, FROM = 8, 3
LAYOUT = "custom_scalars__config__"
ROW = "_hparams_/session_start_info"


class Histograms(Callback):
    """Logs one a step, right after it."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step > trainer.fit_loop.epoch_loop._batches_that_stepped:
            step = trainer.global_step - 1
            trainer.logger.experiment.add_histogram("noise", torch.arange(9.0) * step, step)


def ask(server: str, route: str, tag: str, wanted: int) -> list[Any]:
    """The series of a tag, once it has `wanted` entries or a minute has passed."""
    found: list[Any] = []
    deadline = time.monotonic() + 60
    while len(found) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            with urlopen(f"{server}/{route}?{urlencode({'run': '.', 'tag': tag})}") as answer:
                found = json.load(answer)
        except (URLError, ConnectionError):  # not up, or not loaded
            continue
    return found


def table(server: str, *columns: str) -> list[dict[str, Any]]:
    """Rows of the HParams tab: settings and figures by name."""
    wanted = {
        "allowedStatuses": ["STATUS_UNKNOWN"],
        "aggregationType": "AGGREGATION_AVG",
        "startIndex": 0,
        "sliceSize": 9,
        "colParams": [{"metric": {"group": "", "tag": column}} for column in columns],
    }
    request = Request(f"{server}/hparams/session_groups", json.dumps(wanted).encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request) as answer:
        groups = json.load(answer)["sessionGroups"]
    return [
        group["hparams"] | {m["name"]["tag"]: m["value"] for m in group["metricValues"]}
        for group in groups
    ]


@pytest.fixture(scope="module")
def whole(untrained_lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run's folder."""
    folder = tmp_path_factory.mktemp("whole")
    settings(folder, steps=STEPS, every=1, keep=-1, callbacks=[f"{__name__}.Histograms"])
    (folder / "lab").symlink_to(untrained_lab / "lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", str(CONFIG), "--config", "settings.yaml"])
    return folder


@pytest.fixture(scope="module")
def resumed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same run, resumed from step FROM."""
    folder = tmp_path_factory.mktemp("resumed") / "copy"
    copytree(whole, folder, symlinks=True)
    start = str(RUN / "checkpoints" / f"epoch=0-step={FROM}.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = ["--config", str(CONFIG), "--config", "settings.yaml", "--ckpt_path", start]
        main(["fit", *command, "--trainer.max_steps=6"])  # two steps less than were logged
    return folder / RUN


def test_readers_of_event_files_see_one_run(whole: Path, resumed: Path) -> None:
    for read in (scalars, tensors):
        expected, found = read(whole / RUN), read(resumed)
        assert {"loss", "val/sums/length"} <= expected.keys() or "noise" in expected
        for tag, series in expected.items():
            assert found[tag] == [entry for entry in series if entry[0] < 6], tag


@pytest.mark.slow  # the readers that the server has are tested above
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fast", [False, True], ids=["python", "fast"])
def test_the_server_shows_one_run(whole: Path, resumed: Path, fast: bool) -> None:
    if fast:
        pytest.importorskip("tensorboard_data_server")
    expected = scalars(whole / RUN)
    with tensorboard(resumed, fast=fast) as address:
        server = f"{address}/data/plugin"
        loss = ask(server, "scalars/scalars", "loss", 6)
        assert [(step, value) for _, step, value in loss] == expected["loss"][:6]
        scores = ask(server, "scalars/scalars", "val/sums/length", 1)
        assert [step for _, step, _ in scores] == [5]
        texts = ask(server, "text/text", "rollouts/text_summary", 2)
        assert [entry["step"] for entry in texts] == [0, 3]
        histograms = ask(server, "histograms/histograms", "noise", 6)
        assert [entry[1] for entry in histograms] == list(range(6))
        images = ask(server, "images/images", "signal/by_depth", 2)
        assert [entry["step"] for entry in images] == [0, 3]
        (row,) = table(server, "loss", "val/sums/length")
        assert (row["method"], row["optimizer.lr"]) == ("GOPD", 2.5e-3)
        assert row["trainer.max_steps"] == STEPS  # as the run began
        assert row["loss"] == expected["loss"][5][1]
        with urlopen(f"{server}/custom_scalars/layout") as answer:
            categories = [category["title"] for category in json.load(answer)["category"]]
        assert categories == [
            "Does it learn?",
            "Are the responses healthy?",
            "What does the teacher say?",
            "Where does the time go?",
        ]


def test_every_chart_has_its_figures(whole: Path) -> None:
    """The layout names tags by regular expressions, which no other test checks."""
    events = EventAccumulator(str(whole / RUN))
    events.Reload()
    (entry,) = events.Tensors(LAYOUT)
    layout = Layout.FromString(entry.tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert charts
    logged = set(events.Tags()["scalars"])
    for chart in charts:
        margins = [
            tag
            for series in chart.margin.series
            for tag in (series.value, series.lower, series.upper)
        ]
        assert set(margins) <= logged, chart.title
        for tag in chart.multiline.tag:
            assert any(re.match(tag, name) for name in logged), chart.title


def test_the_documentation_lists_every_figure(whole: Path) -> None:
    events = EventAccumulator(str(whole / RUN))
    events.Reload()
    logged = set(events.Tags()["scalars"])
    assert len(logged) > 50
    assert not unlisted(logged)


def test_starts_are_noted(whole: Path, resumed: Path) -> None:
    (first,) = (whole / RUN / "starts.jsonl").read_text().splitlines()
    lines = (resumed / "starts.jsonl").read_text().splitlines()
    assert lines[0] == first
    again = json.loads(lines[1])
    assert again["step"] == FROM
    assert again["checkpoint"].endswith(f"step={FROM}.ckpt")
    assert again["seeds"] == {"seed_everything": 0, "data": 0}


def test_who_goes_on_in_another_folder_is_a_run_of_its_own(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole)
    command = ["--config", str(CONFIG), "--config", "settings.yaml"]
    start = str(RUN / "checkpoints" / f"epoch=0-step={FROM}.ckpt")
    rate = "--model.init_args.scale=1.1"
    place = f"--trainer.logger.init_args.save_dir={tmp_path}"
    main(["fit", *command, "--ckpt_path", start, rate, place, "--trainer.max_steps=4"])
    assert {LAYOUT, ROW} <= tensors(tmp_path).keys()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    content = events.SummaryMetadata(ROW).plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["scale"].number_value == 1.1
