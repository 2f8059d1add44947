"""Loading of a run's training prompts, checked against every model that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_lightning.data.mix import samplings_by_author
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import Loaded
from opd_lightning.processes import Ranks
from opd_lightning.run.prompt_checks import PromptCheck, check_teachers
from opd_lightning.types import Author

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
    options = {name: f"{name}.prompts" for name in files}
    data.prompt_files.agree({"data.train": data.train, **files}, Ranks.of(data.trainer), options)
    renderer = data.renderer(training=True)
    fits = PromptCheck(
        data.module,
        renderer,
        data.sampling,
        data.mix,
        data.teacher,
        asks=data.module.all_asks().values(),
        max_tokens=data.max_tokens_per_micro_batch,
    )
    checks = RowChecks(renderer, data.verifier, fits)
    prompts = data.train.load(data.prompt_files.size, checks)
    ids = checks.ids_of(prompts)
    samplings = samplings_by_author(data.sampling, data.mix, data.teacher)
    temperature = samplings[Author.STUDENT].temperature
    check_teachers(data.module, prompts, ids, renderer, temperature, data.mix)
    return Loaded(prompts, ids)
