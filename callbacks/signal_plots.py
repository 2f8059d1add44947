"""Plots of the teacher's signal: its histogram and its profile over the response."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from opd_lightning.errors import UserError
from opd_lightning.metrics.depth import DECILES
from opd_lightning.metrics.media import run_folder_of, write_picture
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.callback import RunCallback

LIMIT, BINS = 10.0, 200  # nats; larger values are counted in the outer bins
COLOURS = "#4c72b0", "#c44e52"


class SignalPlots(RunCallback):
    """Logs d_t = log pi_T - log pi_S of a whole step, over all ranks, as pictures.

    The image `signal/by_depth` shows its mean and absolute mean by tenth of
    `sampling.max_new_tokens`. `signal/log_ratio` is its histogram, in bins of 0.1 nats, in
    TensorBoard alone. Methods without a teacher log neither.

    Args:
        every_n_steps: Optimiser steps between two entries.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise UserError(f"SignalPlots.every_n_steps: got {every_n_steps}, expected at least 1")
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: Trainer, module: DistillationModule, optimizer: Optimizer
    ) -> None:
        # Last hook before the module logs and resets its metrics.
        step = trainer.global_step
        is_kept = trainer.logger is not None or run_folder_of(trainer) is not None
        if step % self.every_n_steps or not is_kept:
            return
        sums = module.depth.sums
        ratios = torch.cat([sums.new_zeros(0), *module.signal.log_ratios])
        here = torch.cat([sums.flatten(), *histogram(ratios)])
        whole: Tensor = trainer.strategy.reduce(here, reduce_op="sum")
        depth, counts, moments = whole.cpu().split([sums.numel(), BINS, 2])
        if not trainer.is_global_zero or not counts.any():
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _add_histogram(logger.experiment, counts, moments, step)
        write_picture(trainer, "signal/by_depth", draw(depth.view(3, DECILES)), step)


def histogram(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts `[BINS]` of d_t `[N]` float64 in nats, and its sum and sum of squares `[2]`.

    Values that are not finite are left out: their step is skipped with a message.
    """
    ratio = ratio[ratio.isfinite()]
    counts = torch.histc(ratio.clamp(-LIMIT, LIMIT), BINS, -LIMIT, LIMIT)
    return counts, torch.stack([ratio.sum(), (ratio**2).sum()])


def _add_histogram(writer: SummaryWriter, counts: Tensor, moments: Tensor, step: int) -> None:
    edges = torch.linspace(-LIMIT, LIMIT, BINS + 1, dtype=torch.float64)
    filled = counts.nonzero()
    writer.add_histogram_raw(
        "signal/log_ratio",
        min=float(edges[filled[0]]),
        max=float(edges[filled[-1] + 1]),
        num=int(counts.sum()),
        sum=float(moments[0]),
        sum_squares=float(moments[1]),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def draw(depth: Tensor) -> np.ndarray:
    """Plot sums of token counts, d_t and |d_t| by depth `[3, 10]`; return `[H, W, 3]` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens, ratio, size = depth.numpy()
    tenths = np.flatnonzero((tokens > 0) & np.isfinite(size))
    figure = Figure(figsize=(4.2, 2.6), dpi=80)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.16, 0.19, 0.81, 0.68))  # an automatic layout draws twice
    axes.bar(tenths, size[tenths] / tokens[tenths], color=COLOURS[0], label="absolute mean")
    axes.plot(tenths, ratio[tenths] / tokens[tenths], "o-", color=COLOURS[1], label="mean")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xticks=range(DECILES),
        xlim=(-0.6, DECILES - 0.4),
        xlabel="tenth of sampling.max_new_tokens",
        ylabel="d_t, nats per token",
    )
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
