"""TensorBoard's Custom Scalars and HParams tabs: main charts, and a row for the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import custom_scalars, hparams

from opd_lightning.evaluation.base import Chart
from opd_lightning.training.callback import Layout, RunCallback, run_callbacks

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

# Settings that the HParams tab shows by default.
SHOWN = ("method", "student.path", "teacher.path", "optimizer.lr", "data.prompts_per_step")


def write_dashboard(
    trainer: Trainer, module: DistillationModule, settings: Mapping[str, float | str]
) -> None:
    """Lay out the Custom Scalars tab, and list the run in the HParams tab.

    The table's figures are the last values of the run's scalars, so that a resumed run updates its
    row. For a folder of several runs, TensorBoard uses the columns of the first one.

    Args:
        trainer: Provides loggers, callbacks and data; call this on the process that writes.
        module: The method.
        settings: Settings of the run, by name; an empty mapping writes no row.
    """
    data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
    summaries = [custom_scalars(_layout(trainer, module, data))]
    if settings:
        table, row, _ = hparams(dict(settings), dict.fromkeys(_results(data), 0.0))
        _show_first(table)
        summaries += [table, row]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for summary in summaries:
                logger.experiment.file_writer.add_summary(summary)


def _show_first(table: Summary) -> None:
    """Mark `SHOWN` as differing: TensorBoard shows five columns, those that differ first."""
    about = table.value[0].metadata.plugin_data
    columns = HParamsPluginData.FromString(about.content)
    for column in columns.experiment.hparam_infos:
        column.differs = column.name in SHOWN
    about.content = columns.SerializeToString(deterministic=True)


def _results(data: RolloutDataModule) -> list[str]:
    """Return the names of the figures whose last values the table shows."""
    rewarded = ["reward"] if data.verifier else []
    suites = [f"val/{name}/{chart.figure}" for name, chart in _charts(data).items()]
    return [*suites, *rewarded, "loss", "response/length", "response/truncated"]


def _charts(data: RolloutDataModule) -> dict[str, Chart]:
    """Return the chart of every validation suite that has one."""
    charts = {n: suite.chart(data.verifier) for n, suite in data.suites_of("validate").items()}
    return {name: chart for name, chart in charts.items() if chart is not None}


def _layout(trainer: Trainer, module: DistillationModule, data: RolloutDataModule) -> Layout:
    """Return charts of the figures that the run logs; callbacks add theirs as `charts`."""
    learns: dict[str, list[Any]] = {}
    for name, (figure, has_interval) in _charts(data).items():
        tag = f"val/{name}/{figure}"
        if has_interval:
            margin = ["Margin", [tag, f"{tag}_low", f"{tag}_high"]]
            learns[f"{name}: {figure} and its 95 % interval"] = margin
        else:
            learns[f"{name}: {figure}"] = _lines(tag)
    if data.verifier:
        learns["mean reward of the step"] = _lines("reward")
    layout: Layout = {
        "Does it learn?": learns | {"loss": _lines("loss")},
        "Are the responses healthy?": {
            "mean length, in tokens": _lines("response/length"),
            "share truncated, share repetitive": _lines("response/(truncated|repetitive)"),
            "entropy, in nats per token": _lines("entropy/(student|teacher)"),
        },
    }
    if "teacher" in module.all_asks():
        layout["What does the teacher say?"] = {
            "d_t = log pi_T - log pi_S: mean and absolute mean": _lines(
                "signal/log_ratio_(mean|abs_mean)"
            ),
            "overlap of the likeliest tokens": _lines("overlap/ratio"),
            "absolute d_t by tenth of the response": _lines("depth_log_ratio_abs/[0-9]"),
        }
    layout = with_charts(layout, run_callbacks(trainer))
    layout["Where does the time go?"] = {
        "seconds of every stage": _lines("time/.*_seconds"),
        "response tokens per second": _lines("tokens_per_second"),
        "engine against trainer, in nats": _lines("engine/logprob_gap_(mean|max)"),
    }
    return layout


def with_charts(layout: Layout, callbacks: Iterable[RunCallback]) -> Layout:
    """Return a layout with the charts of callbacks; several may add to one category."""
    for callback in callbacks:
        for category, charts in callback.charts.items():
            layout = {**layout, category: layout.get(category, {}) | charts}
    return layout


def _lines(tags: str) -> list[Any]:
    return ["Multiline", [f"{tags}$"]]  # TensorBoard matches from the beginning of a tag
