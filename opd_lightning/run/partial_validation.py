"""Checks of Trainer options that measure only the first batches of a suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_lightning.errors import UserError

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule


def check_limits(data: RolloutDataModule, stage: str) -> None:
    """Check that every suite of a stage may be cut to the batches that the Trainer measures.

    `fast_dev_run` and `overfit_batches` set the same limit.

    Args:
        data: The run's data, with the suites of the stage loaded.
        stage: "fit", "validate" or "test".

    Raises:
        UserError: A suite would have no batch, or be cut although it must be measured whole.
    """
    name = "limit_test_batches" if stage == "test" else "limit_val_batches"
    limit: float = getattr(data.trainer, name)
    if not limit or (limit == 1.0 and isinstance(limit, float)):
        return
    for suite_name, suite in data.suites_of(stage).items():
        batches = len(suite.stream(suite_name, data.loaded[suite_name], data.bench))
        kept = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
        got = f"trainer.{name}: got {limit}"
        if not kept:
            raise UserError(
                f"{got}, which is none of the {batches} batches of suite {suite_name!r}; give a "
                "number of batches, or lower the suite's batch_size"
            )
        if kept < batches and suite.is_whole:
            raise UserError(
                f"{got}, but suite {suite_name!r} of {batches} batches is graded as a whole; set "
                f"data.{data.section_of[suite_name]}.{suite_name}.limit to fewer documents instead"
            )
