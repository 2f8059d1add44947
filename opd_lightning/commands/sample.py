"""`opd sample`: responses of a student, with tokens coloured by the teacher's log-probs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, TextIO

import torch
from rich.console import Console

from opd_lightning.commands.export import load_student
from opd_lightning.commands.token_scores import TokenScorer
from opd_lightning.data.engines import push
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.errors import UserError, note, report
from opd_lightning.models.tokenization import token_texts
from opd_lightning.rollouts import Engine, HFEngine, Sampling
from opd_lightning.run.outputs import write_text
from opd_lightning.run.prompt_checks import PromptCheck
from opd_lightning.run.signals import signal_of
from opd_lightning.seeding import SHOWN_SAMPLE, derive_seed
from opd_lightning.terminal.token_page import TokenRow, token_page
from opd_lightning.terminal.token_text import coloured, plain
from opd_lightning.types import Author, Message, Prompt, Rollout

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

NEW = "/new"  # starts a new conversation


@dataclass(frozen=True, kw_only=True)
class Question:
    """Sampling settings and prompt fields of a conversation.

    Args:
        samples: Responses per prompt.
        sampling: Sampling of the responses.
        privileged: Text shown to the teacher only.
        answer: Reference answer, for a verifier and for views that show it.
        domain: Domain of the prompt, which selects the teacher if there are several.
    """

    samples: int
    sampling: Sampling
    privileged: str | None = None
    answer: str | None = None
    domain: str = "default"

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        # Token ids of prompts are kept by their ids, and every turn has other messages.
        digest = blake2b(json.dumps(messages).encode(), digest_size=8).hexdigest()
        return Prompt(
            id=f"prompt-{digest}",
            messages=tuple(messages),
            answer=self.answer,
            privileged=self.privileged,
            domain=self.domain,
            origin="prompt",
        )


def unread(module: DistillationModule, data: RolloutDataModule, question: Question) -> list[str]:
    """Return the options that give fields of a prompt which neither teacher nor verifier reads."""
    ask = module.all_asks().get("teacher")
    view = data.views.get(ask.view) if ask is not None else None
    read = set(view.variables) if view is not None else set()
    if data.verifier is not None:  # it may have a part for each domain
        read |= {"answer"} if question.answer is None else {"answer", "domain"}
    if any(teacher.domains for teacher in module.teachers()):
        read.add("domain")
    given = {"privileged": question.privileged, "answer": question.answer}
    names = [name for name, text in given.items() if text is not None]
    names += ["domain"] if question.domain != "default" else []
    return [f"--{name}" for name in names if name not in read]


class Sampler:
    """Samples responses with an engine, scores and prints them.

    The teacher is used only if tokens are coloured: on a terminal or with `html`.

    Args:
        module: Method with student and teacher.
        data: Data module with engine, chat template, views and verifier.
        question: Sampling settings and prompt fields.
        console: Output of the responses. On a terminal tokens are coloured.
        html: File for an HTML page of all responses.
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
        if names := unread(module, data, question):
            note(f"nothing in this run reads {' and '.join(names)}; leave it out")
        self.engine: Engine = data.engine or HFEngine()
        seen = console.is_terminal or html is not None
        self.scorer = TokenScorer(module, data, question.prompt(())) if seen else None
        self.renderer = self.scorer.renderer() if self.scorer else data.renderer(training=False)
        verifier = data.verifier if question.answer is not None else None
        engines = {Author.STUDENT: self.engine}
        self.writer = RolloutWriter(engines, verifier, self.renderer, module.timer)
        self._turns = 0
        self._rows: list[TokenRow] = []

    def check(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the prompt. Raise UserError if it cannot be answered."""
        prompt, sampling = self.question.prompt(messages), self.question.sampling
        ids = self.renderer.plain(prompt)
        asks = [self.scorer.ask] if self.scorer is not None and self.scorer.ask is not None else []
        PromptCheck(self.module, self.renderer, sampling, RolloutMix(), asks=asks)(prompt, ids)
        return ids

    def start(self, checkpoint: str | None, max_length: int, device: torch.device) -> None:
        """Check the settings and load all weights.

        Args:
            checkpoint: Checkpoint of the run; None uses the student's folder.
            max_length: Largest number of tokens of a prompt and its response.
            device: Device of student and teacher.
        """
        source, student = self.module.student.source, self.module.student
        self.engine.check(source, max_length=max_length)
        with redirect_stdout(sys.stderr):  # libraries may print to stdout
            if self.scorer is not None:
                self.scorer.check(self.question.prompt(()))
            if checkpoint is not None:
                load_student(student, checkpoint)
            student.load()
            self.module.to(device)
            if self.scorer is not None:
                self.scorer.load(device)
            self.engine.start(source, max_length=max_length)
            push(student, self.engine, version=0)
        if self.scorer is not None:
            note(f"tokens are coloured {self.scorer.legend}")

    def close(self) -> None:
        self.engine.close()
        if self.scorer is not None:
            self.scorer.close()

    def answer(self, messages: Sequence[Message]) -> str:
        """Sample and show all responses; return the first."""
        ids, prompt = self.check(messages), self.question.prompt(messages)
        self._turns += 1
        rows = [
            Row(prompt, ids, 0, Author.STUDENT, seed)
            for sample in range(self.question.samples)
            for seed in [derive_seed(SHOWN_SAMPLE, self.data.seed, self._turns, sample)]
        ]
        with redirect_stdout(sys.stderr):
            rollouts = self.writer.write(rows, {Author.STUDENT: self.question.sampling})
            figures = self.scorer.figures(rollouts) if self.scorer else [{} for _ in rollouts]
        for rollout, known in zip(rollouts, figures, strict=True):
            self._show(rollout, known)
        if self.html is not None:
            page = token_page(f"opd sample {self.module.student.source.path}", self._rows)
            write_text("--html", self.html, page)
        return rollouts[0].text

    def _show(self, rollout: Rollout, figures: dict[str, list[float]]) -> None:
        caption = _caption(rollout, figures)
        if figures:
            tokens = token_texts(self.renderer.tokenizer, rollout.response_ids)
            prompt = "\n".join(f"[{m['role']}] {m['content']}" for m in rollout.prompt.messages)
            self._rows.append(TokenRow(prompt, caption, tokens, figures))
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
    """Return the given prompt, or else the content of stdin; None if stdin is a terminal."""
    if given is None and stdin.isatty():
        return None
    text = _text(stdin.read).removesuffix("\n") if given is None else given
    if not text.strip():
        where = "on stdin" if given is None else "with --prompt"
        raise UserError(f"prompt: got an empty one {where}, expected a text to answer")
    return text


def _text(read: Callable[[], str]) -> str:
    """Return what was read from stdin; raise UserError if it is no text."""
    try:
        text = read()
        text.encode()  # bytes that are no text may have been read as surrogates
    except UnicodeError as error:
        raise UserError(
            "prompt: got bytes on stdin that are no text in UTF-8; convert it (iconv -t UTF-8)"
        ) from error
    return text


def chat(sampler: Sampler, first: Sequence[Message], read: Callable[[], str]) -> None:
    """Run a conversation, one turn per line, until the input or Ctrl-C ends it.

    With several samples, the conversation continues with the first. A line that cannot be answered
    is reported and left out of the conversation.

    Args:
        sampler: Started sampler.
        first: Initial messages of every conversation.
        read: Returns the next line; raises EOFError at the end.
    """
    note(f"one line is one turn; {NEW} begins anew, Ctrl-D ends")
    messages = list(first)
    while True:
        try:
            line = _text(read).strip()
            if line == NEW:
                messages = list(first)
            elif line:
                message: Message = {"role": "user", "content": line}
                response = sampler.answer([*messages, message])
                messages += [message, {"role": "assistant", "content": response}]
        except UserError as error:
            report(f"{error} ({NEW} begins anew)")
        except EOFError:
            return
        except KeyboardInterrupt as interrupt:
            if signal_of(interrupt) == SIGINT:
                return
            raise
