"""Subcommands of `opd` besides training and evaluation, one method each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch import Trainer as LightningTrainer
from rich.console import Console

from opd_lightning.checkpoints.reading import state_of
from opd_lightning.commands.cache_teacher import fill
from opd_lightning.commands.export import load_student, write_hf_folder
from opd_lightning.commands.model_card import model_card
from opd_lightning.commands.sample import Question, Sampler, chat, read_prompt
from opd_lightning.commands.write_responses import write_responses
from opd_lightning.errors import NotReadyError, UserError
from opd_lightning.preflight import report
from opd_lightning.preflight.check import run_checks
from opd_lightning.preflight.estimate import Lengths, estimate
from opd_lightning.preflight.finding import Finding
from opd_lightning.preflight.speeds import Gpu
from opd_lightning.run import outputs
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.run.model_checks import check_models, check_usable
from opd_lightning.teachers.cached import CachedTeacher
from opd_lightning.terminal.quiet import only_warnings
from opd_lightning.training.base import DistillationModule
from opd_lightning.types import Author, Message


class Commands(LightningTrainer):
    """Lightning's Trainer with additional commands."""

    def _connect(self, model: DistillationModule, datamodule: RolloutDataModule) -> None:
        """Connect the trainer to a method and its data, as Lightning's commands do."""
        self.strategy.connect(model)
        self.datamodule = datamodule
        model.trainer = datamodule.trainer = self

    def export(
        self,
        model: DistillationModule,
        ckpt_path: str,
        out: str,
        card: bool = False,
        datamodule: LightningDataModule | None = None,
    ) -> None:
        """Write a checkpoint's student as a Hugging Face folder.

        Args:
            ckpt_path: Checkpoint of the run whose config is given; last: its newest whole one.
            out: Folder to write; must not exist or be empty.
            card: Also write README.md, a model card with models, settings and scores of the run.
            datamodule: Not needed; all commands are called with one.
        """
        folder = Path(os.path.expanduser(out))
        outputs.check_folder("--out", folder)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out: {out!r} is not empty; name a new folder")
        check_usable(model.student.source)
        saved = load_student(model.student, ckpt_path)
        with outputs.writing_folder("--out", folder):
            write_hf_folder(model.student, folder)
            if card:
                text = model_card(model, folder.name, saved, state_of(saved))
                (folder / "README.md").write_text(text, encoding="utf-8")
        print(f"wrote the student of step {saved.step} to {folder}")

    def check(
        self,
        model: DistillationModule,
        datamodule: RolloutDataModule,
        samples: int = 16,
        compare_teachers: bool = True,
        json: bool = False,
    ) -> None:
        """Check a run before its start: settings, tokens, numbers, cost. Writes nothing.

        Runs in one process, with unsharded student and teachers on its device.

        Args:
            samples: Responses that the numbers are measured on.
            compare_teachers: Also load the weights of teachers in other processes and compare
                log-probs.
            json: Print one JSON object instead of a table.
        """
        if samples < 1:
            raise UserError(f"--samples: got {samples}, expected at least 1")
        only_warnings()
        self._connect(model, datamodule)
        try:
            with redirect_stdout(sys.stderr):  # libraries may print to stdout
                findings = run_checks(
                    self, model, datamodule, samples=samples, compare_teachers=compare_teachers
                )
        finally:
            datamodule.teardown("fit")
            model.teardown("fit")
        _report(findings, as_json=json)

    def estimate(
        self,
        model: DistillationModule,
        datamodule: RolloutDataModule,
        prompt_tokens: int | None = None,
        longest_prompt: int | None = None,
        response_tokens: int | None = None,
        gpu_memory: float = 140.0,
        peak_tflops: float = 989.0,
        training_share: float = 0.35,
        scoring_share: float = 0.45,
        bandwidth: float = 4.8,
        decoding_share: float = 0.6,
        json: bool = False,
    ) -> None:
        """Estimate memory, tokens and hours of a run of any size. Writes nothing, loads nothing.

        Of models only config.json is read, and neither prompts nor a GPU are needed: models are
        built without weights. Speeds are assumed, by default those of an H200.

        Args:
            prompt_tokens: Tokens of a prompt, on average; None is 512, or fewer if the student's
                context holds no more beside a response.
            longest_prompt: Tokens of the longest prompt; None is 2048, or fewer likewise.
            response_tokens: Tokens of a response, on average; None is as many as allowed.
            gpu_memory: GiB of a GPU.
            peak_tflops: Dense bfloat16 operations a second of a GPU, in 10^12.
            training_share: Share of the peak that the student's passes reach.
            scoring_share: Share of the peak that passes without a gradient reach.
            bandwidth: Bytes of its memory that a GPU reads a second, in 10^12.
            decoding_share: Share of the bandwidth that decoding reaches.
            json: Print one JSON object instead of a table.
        """
        lengths = Lengths(
            prompt=prompt_tokens, longest_prompt=longest_prompt, response=response_tokens
        )
        gpu = Gpu(
            memory=gpu_memory * 2**30,
            peak=peak_tflops * 1e12,
            training=training_share,
            scoring=scoring_share,
            bandwidth=bandwidth * 1e12,
            decoding=decoding_share,
        )
        only_warnings()
        self._connect(model, datamodule)
        with redirect_stdout(sys.stderr):  # libraries may print to stdout
            findings = estimate(self, model, datamodule, lengths, gpu)
        _report(findings, as_json=json, ready=report.ESTIMATED)

    def sample(
        self,
        model: DistillationModule,
        datamodule: RolloutDataModule,
        prompt: str | None = None,
        system: str | None = None,
        samples: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
        privileged: str | None = None,
        answer: str | None = None,
        domain: str = "default",
        html: str | None = None,
        max_length: int | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Answer a prompt, or chat, with tokens coloured by the teacher's log-probs.

        Without --prompt the prompt is read from stdin; on a terminal every line is a turn of a
        conversation. Tokens are coloured on a terminal and in the HTML page; without a teacher by
        the student's log-prob. Runs in one process.

        Args:
            prompt: The user's message.
            system: System message before it.
            samples: Number of responses.
            temperature: Sampling temperature, 0 for greedy; None takes data.sampling, as for the
                next two. Student and teacher are always compared at data.sampling.temperature.
            top_p: Probability mass of nucleus sampling.
            max_new_tokens: Largest number of tokens of a response.
            privileged: Privileged text, for teachers whose view shows it.
            answer: Reference answer; with it data.verifier scores the responses.
            domain: Domain of the prompt, which selects the teacher if there are several.
            html: File for an HTML page of all responses.
            max_length: Largest number of tokens of a conversation; None: the student's context.
            ckpt_path: Checkpoint of the run whose config is given, or last, its newest whole
                one; without it the student is the Hugging Face folder that the config names.
        """
        given = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        for name, value in (("samples", samples), ("max_length", max_length)):
            if value is not None and value < 1:
                raise UserError(f"--{name}: got {value}, expected at least 1")
        page = None if html is None else Path(os.path.expanduser(html))
        if page is not None:
            outputs.check_file("--html", page)
        question = Question(
            samples=samples,
            sampling=replace(datamodule.sampling, **changes),
            privileged=privileged,
            answer=answer,
            domain=domain,
        )
        text = read_prompt(prompt, sys.stdin)
        only_warnings()
        self._connect(model, datamodule)
        check_models(model)
        sampler = Sampler(model, datamodule, question, Console(file=sys.stdout), page)
        first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        longest = max_length or model.student.source.context_length
        if text is not None:
            first.append({"role": "user", "content": text})
            longest = len(sampler.check(first)) + question.sampling.max_new_tokens
            if max_length is not None and longest > max_length:
                raise UserError(
                    f"--max_length: got {max_length}, but the prompt and its response may have "
                    f"{longest} tokens; raise it, or lower --max_new_tokens"
                )
        try:
            sampler.start(ckpt_path, longest, self.strategy.root_device)
            if text is not None:
                sampler.answer(first)
            else:
                chat(sampler, first, lambda: input("> "))
        finally:
            sampler.close()

    def cache_teacher(
        self,
        model: DistillationModule,
        batch_tokens: int = 16384,
        datamodule: RolloutDataModule | None = None,
    ) -> None:
        """Fill the caches of a run's CachedTeachers with scores of its recorded responses.

        Run it again to continue after an interruption. Runs on the first device of the trainer.

        Args:
            batch_tokens: Largest number of tokens of a batch, prompts and padding included.
            datamodule: Data module with the responses.
        """
        cached = [part for part in model.teacher_parts() if isinstance(part, CachedTeacher)]
        if not cached:
            raise UserError(
                "model: it asks no CachedTeacher, so there is nothing to cache; put one around the "
                "teacher"
            )
        assert datamodule is not None
        for teacher in cached:
            teacher.collect_unknown()
        self._connect(model, datamodule)
        datamodule.setup("fit")
        for teacher in cached:
            fill(
                teacher,
                student=model.student,
                device=self.strategy.root_device,
                batch_tokens=batch_tokens,
            )

    def write_responses(
        self,
        model: DistillationModule,
        out: str,
        author: Literal["student", "teacher"] = "student",
        samples: int = 1,
        batch_size: int = 256,
        ckpt_path: str | None = None,
        datamodule: RolloutDataModule | None = None,
    ) -> None:
        """Write responses to the prompts of data.train, as a prompt file of recorded responses.

        Run it again to continue after an interruption.

        Args:
            out: File to write, JSON lines.
            author: The student with data.engine, or the teacher of data.teacher.
            samples: Responses per prompt.
            batch_size: Prompts per call of the engine.
            ckpt_path: Checkpoint of the student, or last, the run's newest whole one; without
                it the student is the folder that the config names.
            datamodule: Data module with the prompts, engines and sampling.
        """
        assert datamodule is not None
        write_responses(
            model,
            datamodule,
            Path(os.path.expanduser(out)),
            kind=Author(author),
            samples=samples,
            batch_size=batch_size,
            ckpt_path=ckpt_path,
        )


def _report(findings: Sequence[Finding], *, as_json: bool, ready: str = report.READY) -> None:
    """Print findings; raise NotReadyError if one is an error."""
    if as_json:
        print(report.as_json(findings, ready))
    else:
        report.as_table(findings, Console(), ready)
    if any(finding.level == "error" for finding in findings):
        raise NotReadyError(report.verdict(findings))
