"""What TensorBoard shows of a run that went on from an older checkpoint, asked over HTTP."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from socket import socket
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
from lightning.pytorch import Callback

from opd_lightning.cli import main
from tests.killing import CONFIG, RUN, scalars, settings, tensors

STEPS, FROM = 8, 3


class Histograms(Callback):
    """Logs one a step, right after it."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step > trainer.fit_loop.epoch_loop._batches_that_stepped:
            step = trainer.global_step - 1
            trainer.logger.experiment.add_histogram("noise", torch.arange(9.0) * step, step)


@contextmanager
def tensorboard(run: Path, fast: bool) -> Iterator[str]:
    """A server's address; `fast` is the loader that it takes by default, a program of its own."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["--logdir", str(run), "--port", str(port), "--load_fast", str(fast).lower()]
    process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *command])
    try:
        yield f"http://127.0.0.1:{port}/data/plugin"
    finally:
        process.terminate()
        process.wait()


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
    """The same, after which somebody went on from step FROM."""
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fast", [False, True], ids=["python", "fast"])
def test_the_server_shows_one_run(whole: Path, resumed: Path, fast: bool) -> None:
    if fast:
        pytest.importorskip("tensorboard_data_server")
    expected = scalars(whole / RUN)
    with tensorboard(resumed, fast) as server:
        loss = ask(server, "scalars/scalars", "loss", 6)
        assert [(step, value) for _, step, value in loss] == expected["loss"][:6]
        scores = ask(server, "scalars/scalars", "val/sums/length", 1)
        assert [step for _, step, _ in scores] == [5]
        texts = ask(server, "text/text", "rollouts/text_summary", 2)
        assert [entry["step"] for entry in texts] == [0, 3]
        histograms = ask(server, "histograms/histograms", "noise", 6)
        assert [entry[1] for entry in histograms] == list(range(6))
