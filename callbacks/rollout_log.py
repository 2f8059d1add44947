"""Sample rollouts in the run's loggers, a JSON lines file and HTML pages with coloured tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from opd_lightning.errors import UserError
from opd_lightning.metrics.media import write_table
from opd_lightning.models.strict_json import dumps
from opd_lightning.models.tokenization import token_texts
from opd_lightning.terminal.token_page import TokenRow, token_page
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.callback import RunCallback
from opd_lightning.types import Rollout, RolloutBatch

COLUMNS = ("prompt", "author", "response", "end", "reward", "mean log-prob")
LINES = "rollouts.jsonl"
OLD_FILES = 4  # files of JSON lines kept besides the current one


class RolloutLog(RunCallback):
    """Logs some rollouts of a step, as a table in the loggers, and in the run folder.

    `rollouts.jsonl` has one object per line, with the sampler's log-probs. A run that is
    resumed from step n removes lines of earlier processes for n and later. The pages
    `rollouts/<step>.html` colour every token by d_t, its advantage, or the effect of a rule.

    Args:
        every_n_steps: Optimiser steps between two entries.
        count: Rollouts per entry.
        max_characters: Longer prompts and responses are cut in the middle in the table, except
            in Weights & Biases.
        max_megabytes: Size at which `rollouts.jsonl` is rotated; the newest five files are kept.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        count: int = 4,
        max_characters: int = 2000,
        max_megabytes: int = 50,
    ) -> None:
        if min(every_n_steps, count, max_megabytes) < 1:
            raise UserError(
                f"RolloutLog: got every_n_steps={every_n_steps}, count={count}, "
                f"max_megabytes={max_megabytes}, expected all at least 1"
            )
        self.every_n_steps = every_n_steps
        self.count = count
        self.max_characters = max_characters
        self.max_megabytes = max_megabytes
        self._last_step = -1
        self._folder: Path | None = None
        self._lines: RotatingFileHandler | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # `log_dir` is a broadcast, so all ranks must read it; all call this hook.
        self._folder = None if trainer.log_dir is None else Path(trainer.log_dir)
        if self._folder is not None and trainer.is_global_zero:
            _drop_from(self._folder / LINES, trainer.global_step)

    def after_loss(self, trainer: Trainer, module: DistillationModule, batch: RolloutBatch) -> None:
        step = batch.totals.step
        if step == self._last_step or step % self.every_n_steps or not trainer.is_global_zero:
            return
        self._last_step = step
        # Rollouts are sorted by length; an even spacing takes long and short ones.
        spread = range(0, len(batch.rollouts), max(1, len(batch.rollouts) // self.count))
        chosen = list(spread)[: self.count]
        rows = [_cells(batch.rollouts[i]) for i in chosen]
        write_table(trainer, "rollouts", COLUMNS, rows, step, self.max_characters)
        if self._folder is not None:
            self._write_lines(self._folder, step, [batch.rollouts[i] for i in chosen])
            pages = self._folder / "rollouts"
            pages.mkdir(parents=True, exist_ok=True)
            page = token_page(f"step {step}", [_row(module, batch, i) for i in chosen])
            (pages / f"{step:06d}.html").write_text(page, encoding="utf-8")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _write_lines(self, folder: Path, step: int, rollouts: Sequence[Rollout]) -> None:
        if self._lines is None:
            size = self.max_megabytes * 2**20
            path = folder / LINES
            self._lines = RotatingFileHandler(
                path, maxBytes=size, backupCount=OLD_FILES, encoding="utf-8"
            )
        for rollout in rollouts:
            line = dumps({"step": step, **_plain(rollout)}, ensure_ascii=False)
            self._lines.emit(logging.makeLogRecord({"msg": line}))


def _cells(rollout: Rollout) -> list[str]:
    """Return a rollout as a row of the table."""
    mean = sum(rollout.behaviour_logprobs) / max(len(rollout.behaviour_logprobs), 1)
    numbers = (f"{rollout.reward:.2f}", f"{mean:.3f}")
    end = (str(rollout.author), rollout.text, str(rollout.stop_reason))
    return [_question(rollout), *end, *numbers]


def _drop_from(path: Path, step: int) -> None:
    """Remove lines of `step` and later and an incomplete last one, also from rotated files."""
    for file in (path, *(path.with_name(f"{path.name}.{i + 1}") for i in range(OLD_FILES))):
        if not file.is_file():
            continue
        kept = 0  # bytes
        with file.open("r+b") as lines:
            for line in lines:
                if not line.endswith(b"\n") or _step_of(line) >= step:
                    break
                kept += len(line)
            lines.truncate(kept)
        if kept:  # older files hold earlier steps
            return


def _step_of(line: bytes) -> int:
    """Return the step of a line; -1 if it has none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def _question(rollout: Rollout) -> str:
    return " ".join(f"[{m['role']}] {m['content']}" for m in rollout.prompt.messages)


def _plain(rollout: Rollout) -> dict[str, Any]:
    return {
        "prompt": rollout.prompt.id,
        "messages": list(rollout.prompt.messages),
        "author": str(rollout.author),
        "response": rollout.text,
        "stop_reason": str(rollout.stop_reason),
        "reward": rollout.reward,
        "logprobs": [round(x, 5) for x in rollout.behaviour_logprobs],
    }


def _row(module: DistillationModule, batch: RolloutBatch, index: int) -> TokenRow:
    rollout = batch.rollouts[index]
    length = int(batch.response_mask[index].sum())
    figures = {
        name: values.detach().expand_as(batch.response_mask)[index, :length].float().tolist()
        for name, values in module.token_figures.items()
    }
    tokens = token_texts(module.student.source.tokenizer, rollout.response_ids[:length])
    caption = f"{rollout.author}, reward {rollout.reward:.2f}, ended by {rollout.stop_reason}"
    return TokenRow(_question(rollout), caption, tokens, figures)
