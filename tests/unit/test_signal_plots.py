"""Pictures of the teacher's signal."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.signal_plots import BINS, LIMIT, SignalPlots, draw, histogram
from opd_lightning.errors import UserError
from opd_lightning.metrics.depth import DepthStatistics


def test_histogram_counts_every_token() -> None:
    ratio = torch.randn(1000, dtype=torch.float64)
    counts, moments = histogram(ratio)
    expected, _ = np.histogram(ratio.numpy(), BINS, (-LIMIT, LIMIT))
    assert counts.tolist() == expected.tolist()
    assert torch.allclose(moments, torch.stack([ratio.sum(), ratio.square().sum()]))


def test_what_is_large_is_at_the_ends_and_infinities_are_nowhere() -> None:
    ratio = torch.tensor([-50.0, 99.0, 98.0, -torch.inf, torch.nan], dtype=torch.float64)
    counts, moments = histogram(ratio)
    assert [int(counts[0]), int(counts[-1]), int(counts.sum())] == [1, 2, 3]
    assert moments[0] == 147


def test_no_tokens_are_no_counts() -> None:
    counts, moments = histogram(torch.zeros(0, dtype=torch.float64))
    assert not counts.any()
    assert not moments.any()


def test_a_picture_is_the_same_each_time_and_shows_what_differs() -> None:
    depth = torch.ones(3, 10, dtype=torch.float64)
    depth[:, 7:] = 0  # no tokens there
    one = draw(depth)
    assert one.dtype == np.uint8
    assert one.shape[2] == 3
    assert (one == draw(depth)).all()
    depth[2, 3] = 5
    assert (one != draw(depth)).any()


def test_infinite_signals_are_left_out() -> None:
    depth = torch.ones(3, 10, dtype=torch.float64)
    depth[1:, 2] = torch.tensor([-torch.inf, torch.inf])
    draw(depth)


def test_never_is_refused() -> None:
    with pytest.raises(UserError, match="every_n_steps: got 0"):
        SignalPlots(every_n_steps=0)


def test_all_ranks_are_in_the_picture(tmp_path: Path) -> None:
    """With another rank that saw the same tokens."""
    depth, signal = DepthStatistics(), SimpleNamespace(log_ratios=[torch.tensor([0.55, -3.05])])
    depth.sums += 1
    logger = TensorBoardLogger(tmp_path, name="", version="")
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: 2 * tensor)
    trainer: Any = SimpleNamespace(
        global_step=4, strategy=strategy, logger=logger, loggers=[logger], is_global_zero=True
    )
    module: Any = SimpleNamespace(depth=depth, signal=signal)
    SignalPlots(every_n_steps=2).on_before_optimizer_step(trainer, module, optimizer=None)  # type: ignore[arg-type]
    trainer.global_step = 5
    SignalPlots(every_n_steps=2).on_before_optimizer_step(trainer, module, optimizer=None)  # type: ignore[arg-type]
    logger.save()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (entry,) = events.Histograms("signal/log_ratio")
    found = entry.histogram_value
    assert (entry.step, found.num, found.sum) == (4, 4, pytest.approx(-5.0))
    assert (found.min, found.max) == pytest.approx((-3.1, 0.6))
    assert [image.step for image in events.Images("signal/by_depth")] == [4]


def test_without_a_teacher_there_is_nothing_to_see(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    trainer: Any = SimpleNamespace(
        global_step=0, strategy=strategy, logger=logger, loggers=[logger], is_global_zero=True
    )
    module: Any = SimpleNamespace(depth=DepthStatistics(), signal=SimpleNamespace(log_ratios=[]))
    SignalPlots().on_before_optimizer_step(trainer, module, optimizer=None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
