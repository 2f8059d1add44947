"""Loading of a run's training prompts, checked against every model that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import Loaded
from opd_lightning.processes import Ranks
from opd_lightning.run.prompt_checks import check_prompts

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule


def load_training(data: RolloutDataModule) -> Loaded:
    """Load and check the prompts to train on, for every author and every teacher."""
    if data.train is None:
        raise UserError("data.train: got nothing, expected a prompt file to train on")
    sources = {
        f"data.{data.section_of[name]}.{name}": suite.prompt_source
        for name, suite in data.suites_of("validate").items()
    }
    files = {name: source for name, source in sources.items() if source is not None}
    data.prompt_files.agree({"data.train": data.train, **files}, Ranks.of(data.trainer))
    prompts = data.train.load(data.prompt_files.size(data.train))
    if data.verifier is not None:
        data.verifier.check(prompts)
    renderer = data.renderer(training=True)
    ids = [renderer.plain(prompt) for prompt in prompts]
    check_prompts(data.module, prompts, ids, renderer, data.sampling, data.mix, data.teacher)
    return Loaded(prompts, ids)
