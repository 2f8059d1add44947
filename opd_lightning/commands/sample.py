"""Answers of a model, shown with what its teacher thinks of them: what `opd sample` does."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from rich.console import Console

from opd_lightning.commands.export import load_student
from opd_lightning.commands.token_opinions import TokenOpinions
from opd_lightning.commands.token_text import coloured, plain
from opd_lightning.data.engines import push
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.errors import UserError, note, report
from opd_lightning.models.tokenization import token_texts
from opd_lightning.rollouts import Engine, HFEngine, Sampling
from opd_lightning.run.prompt_checks import check_prompts
from opd_lightning.seeding import SHOWN_SAMPLE, derive_seed
from opd_lightning.terminal.token_page import TokenRow, token_page
from opd_lightning.types import Author, Message, Prompt, Rollout

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

NEW = "/new"  # begins another conversation


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked besides the conversation itself.

    Args:
        samples: Responses to a prompt.
        sampling: How they are drawn.
        privileged: Text that the teacher alone may see.
        answer: The reference answer, for a verifier and for views that show it.
        domain: Which of several teachers is asked.
    """

    samples: int
    sampling: Sampling
    privileged: str | None = None
    answer: str | None = None
    domain: str = "default"

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        return Prompt(
            id="prompt",
            messages=tuple(messages),
            answer=self.answer,
            privileged=self.privileged,
            domain=self.domain,
            origin="prompt",
        )


class Sampler:
    """The student, who answers through an engine, and its teacher, if anybody can see colours.

    Args:
        module: The method.
        data: Holds engine, chat template, views and verifier.
        question: What is asked.
        console: Where answers go. On a terminal tokens have colours.
        html: File for a page of all answers.
    """

    def __init__(
        self,
        module: DistillationModule,
        data: RolloutDataModule,
        question: Question,
        console: Console,
        html: Path | None,
    ) -> None:
        self.module = module
        self.data = data
        self.question = question
        self.console = console
        self.html = html
        self.engine: Engine = data.engine or HFEngine()
        seen = console.is_terminal or html is not None
        self.opinions = TokenOpinions(module, data, question.prompt(())) if seen else None
        source = module.student.source
        self.renderer = self.opinions.renderer() if self.opinions else data.renderer(training=False)
        verifier = data.verifier if question.answer is not None else None
        engines = {Author.STUDENT: self.engine}
        self.writer = RolloutWriter(engines, verifier, self.renderer, module.timer)
        self._turns = 0
        self._rows: list[TokenRow] = []
        self._context = source.context_length

    def check(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's ids; UserError if it cannot be answered."""
        prompt, mix = self.question.prompt(messages), RolloutMix()
        ids = self.renderer.plain(prompt)
        sampling = self.question.sampling
        check_prompts(self.module, [prompt], [ids], self.renderer, sampling, mix, training=False)
        return ids

    def start(self, checkpoint: str | None, max_length: int, device: torch.device) -> None:
        """Load all weights, if nothing stands against it.

        Args:
            checkpoint: Of the run; None: the student's folder as it is.
            max_length: Most tokens of a prompt and its response.
            device: Of student and teacher.
        """
        source, student = self.module.student.source, self.module.student
        self.engine.check(source, max_length=max_length)
        with redirect_stdout(sys.stderr):  # libraries print what they like
            if self.opinions is not None:
                self.opinions.check(self.question.prompt(()))
            if checkpoint is not None:
                load_student(student, checkpoint)
            student.load()
            self.module.to(device)
            if self.opinions is not None:
                self.opinions.load(device)
            self.engine.start(source, max_length=max_length)
            push(student, self.engine, version=0)
        if self.opinions is not None:
            note(f"tokens are coloured {self.opinions.whose}")

    def close(self) -> None:
        self.engine.close()
        if self.opinions is not None:
            self.opinions.close()

    def answer(self, messages: Sequence[Message]) -> str:
        """Write and show all samples; hands back the first."""
        ids, prompt = self.check(messages), self.question.prompt(messages)
        self._turns += 1
        rows = [
            Row(prompt, ids, 0, Author.STUDENT, seed)
            for sample in range(self.question.samples)
            for seed in [derive_seed(SHOWN_SAMPLE, self.data.seed, self._turns, sample)]
        ]
        with redirect_stdout(sys.stderr):
            rollouts = self.writer.write(rows, {Author.STUDENT: self.question.sampling})
            figures = self.opinions.figures(rollouts) if self.opinions else [{} for _ in rollouts]
        for rollout, known in zip(rollouts, figures, strict=True):
            self._show(rollout, known)
        if self.html is not None:
            page = token_page(f"opd sample {self.module.student.source.path}", self._rows)
            self.html.write_text(page)
        return rollouts[0].text

    def _show(self, rollout: Rollout, figures: dict[str, list[float]]) -> None:
        caption = _caption(rollout, figures)
        if figures:
            tokens = token_texts(self.renderer.tokenizer, rollout.response_ids)
            asked = "\n".join(f"[{m['role']}] {m['content']}" for m in rollout.prompt.messages)
            self._rows.append(TokenRow(asked, caption, tokens, figures))
        if not self.console.is_terminal:
            print(plain(rollout.text), file=self.console.file)
            if self.question.samples > 1:
                print(f"[{caption}]", file=self.console.file)
            return
        self.console.print(coloured(tokens, next(iter(figures.values()))), soft_wrap=True)
        self.console.print(caption, style="dim", highlight=False, markup=False)


def _caption(rollout: Rollout, figures: dict[str, list[float]]) -> str:
    parts = [f"{len(rollout.response_ids)} tokens, ended by {rollout.stop_reason}"]
    if not math.isnan(rollout.reward):
        parts.append(f"reward {rollout.reward:.2f}")
    for name, values in list(figures.items())[:1]:
        parts.append(f"mean {name} {sum(values) / max(1, len(values)):+.3f}")
    return ", ".join(parts)


def read_prompt(given: str | None, stdin: TextIO) -> str | None:
    """The prompt that was given, or all of stdin; None where somebody sits at it."""
    if given is None and stdin.isatty():
        return None
    text = stdin.read().removesuffix("\n") if given is None else given
    if not text.strip():
        where = "on stdin" if given is None else "with --prompt"
        raise UserError(f"prompt: got an empty one {where}, expected a text to answer")
    return text


def chat(sampler: Sampler, first: Sequence[Message], read: Callable[[], str]) -> None:
    """Answer line after line, each in view of what was said before, until the input ends.

    The conversation goes on with the first of several samples. A line that cannot be answered is
    refused and forgotten.

    Args:
        sampler: Started.
        first: What every conversation begins with.
        read: The next line; EOFError when there is none.
    """
    note(f"one line is one turn; {NEW} begins anew, Ctrl-D ends")
    messages = list(first)
    while True:
        try:
            line = read().strip()
            if line == NEW:
                messages = list(first)
            elif line:
                asked: Message = {"role": "user", "content": line}
                said = sampler.answer([*messages, asked])
                messages += [asked, {"role": "assistant", "content": said}]
        except UserError as error:
            report(f"{error} ({NEW} begins anew)")
        except (EOFError, KeyboardInterrupt):
            return
