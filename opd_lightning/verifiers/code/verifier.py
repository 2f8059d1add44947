"""Verifier of programs by their tests."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier, check_time_limits
from opd_lightning.verifiers.code.sandbox import Group, Kind, Limits, Sandbox, run
from opd_lightning.verifiers.code.tests import Tests, parse_tests, program_of, same_output

if TYPE_CHECKING:
    from opd_lightning.types import Prompt

log = logging.getLogger(__name__)

MAX_PROGRAM = 1_000_000  # characters; longer ones fail unread
SHOWN = 300  # characters of a text in feedback


@dataclass(frozen=True)
class Verdict:
    """Result of the tests of a program."""

    passed: int
    total: int
    failure: str | None  # message of the first test that failed


class CodeVerifier(Verifier):
    """Verifier that runs Python programs against the tests in `answer`.

    The program is the last fenced block of the response that is marked as Python, else the last
    one without a language, else the whole response. Tests are Python statements with asserts
    (also `check(candidate)` functions), a JSON list of asserts, or JSON with inputs and expected
    outputs of programs that read standard input.

    Programs and tests run in separate sandboxed processes: a program gets the arguments of its
    functions and returns values, so it can neither read nor change its tests. Values that are not
    plain (numbers, texts, collections of them, instances of the program's own classes) fail.

    Args:
        partial: Score the share of tests that pass, up to the first that fails; False scores 1 if
            all pass, else 0.
        timeout_seconds: Time limit of one response with all its tests. A slower one scores 0.
        step_seconds: Time limit of all responses of a call, which are those of a step. Those that
            are not checked by then have no reward.
        memory_mb: Address space of a program, in 1e6 bytes.
        max_workers: Programs that run at a time; None takes the number of cores.
        packages: Let programs import the packages of this environment, not only the standard
            library.
        sandbox: "bubblewrap", "limits" (a filter of system calls and Landlock alone) or "auto",
            which takes bubblewrap where it works.
    """

    def __init__(
        self,
        *,
        partial: bool = False,
        timeout_seconds: float = 10.0,
        step_seconds: float = 300.0,
        memory_mb: int = 1000,
        max_workers: int | None = None,
        packages: bool = False,
        sandbox: Kind = "auto",
    ) -> None:
        check_time_limits(
            "CodeVerifier", timeout_seconds=timeout_seconds, step_seconds=step_seconds
        )
        if memory_mb < 100:
            raise UserError(f"CodeVerifier: 'memory_mb' must be at least 100, got {memory_mb}")
        if max_workers is not None and max_workers < 1:
            raise UserError(f"CodeVerifier: 'max_workers' must be at least 1, got {max_workers}")
        self.partial = partial
        self.step_seconds = step_seconds
        self.limits = Limits(timeout_seconds, memory_mb * 1_000_000)
        self.max_workers = max_workers or len(os.sched_getaffinity(0))
        self.packages = packages
        self.kind = sandbox
        # Messages of the last call of `verify`, by prompt and response.
        self._failures: dict[tuple[str, str], str | None] = {}

    @cached_property
    def sandbox(self) -> Sandbox:
        """Sandbox, chosen at first use."""
        sandbox = Sandbox(self.kind, self.packages)
        log.info("CodeVerifier: programs run in %s", sandbox)
        return sandbox

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scores; NaN for a response that was not checked for lack of time."""
        end = monotonic() + self.step_seconds
        sandbox = self.sandbox

        def judge(prompt: Prompt, response: str) -> Verdict | None:
            if monotonic() >= end:
                return None
            return self.judge(sandbox, parse_tests(prompt.answer or ""), response, end)

        with ThreadPoolExecutor(self.max_workers, "program") as pool:
            verdicts = list(pool.map(judge, prompts, responses))
        if missing := verdicts.count(None):
            log.warning(
                "CodeVerifier: %d of %d programs are not verified, because %g s (step_seconds) "
                "have passed; they have no reward",
                missing,
                len(verdicts),
                self.step_seconds,
            )
        self._failures = {
            (prompt.id, response): verdict.failure if verdict else None
            for prompt, response, verdict in zip(prompts, responses, verdicts, strict=True)
        }
        return [math.nan if verdict is None else self._score(verdict) for verdict in verdicts]

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[str | None]:
        """Return the first failing test of each response; None if none failed."""
        known = self._failures
        pairs = list(zip(prompts, responses, strict=True))
        if missing := [pair for pair in pairs if (pair[0].id, pair[1]) not in known]:
            # Another thread has called `verify` since.
            self.verify([prompt for prompt, _ in missing], [text for _, text in missing])
            known = known | self._failures
        return [known.get((prompt.id, response)) for prompt, response in pairs]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `UserError` unless every prompt has tests that can be read, and a sandbox works."""
        super().check(prompts)
        for prompt in prompts:
            try:
                parse_tests(prompt.answer or "")
            except ValueError as error:
                raise UserError(
                    f"{prompt.origin or prompt.id}: CodeVerifier cannot read the tests in "
                    f"'answer': {error}; correct the row"
                ) from error
        _ = self.sandbox

    def judge(self, sandbox: Sandbox, tests: Tests, response: str, end: float) -> Verdict | None:
        """Run one response against its tests; None if `end`, in monotonic seconds, cut it short."""
        program = program_of(response)
        count = len(tests.cases) or 1
        if len(program) > MAX_PROGRAM:
            return Verdict(0, count, f"the program has over {MAX_PROGRAM:,} characters")
        own_end = monotonic() + self.limits.seconds
        method = self._run_cases if tests.cases else self._run_asserts
        verdict = method(sandbox, tests, program, min(end, own_end))
        if verdict is not None:
            return verdict
        if end < own_end:
            return None
        return Verdict(0, count, f"no answer within {self.limits.seconds:g} s")

    def _score(self, verdict: Verdict) -> float:
        passed = verdict.passed / verdict.total
        return passed if self.partial else float(verdict.failure is None and passed == 1)

    def _run_cases(
        self, sandbox: Sandbox, tests: Tests, program: str, end: float
    ) -> Verdict | None:
        """Run the program on one input after another, up to the first wrong output."""
        for number, (given, expected) in enumerate(tests.cases):
            ran = run(sandbox, program, given, self.limits, end)
            if ran.code is None:
                return None
            output = ran.output.decode("utf-8", "replace")
            if ran.code == 0 and same_output(output, expected):
                continue
            said = ran.error.decode("utf-8", "replace").strip().splitlines()
            found = f"output {_cut(output)!r}"
            if ran.code:
                found = (said or [f"exit code {ran.code}"])[-1]
            failure = f"input {_cut(given)!r}: expected {_cut(expected)!r}, got {_cut(found)}"
            return Verdict(number, len(tests.cases), failure)
        return Verdict(len(tests.cases), len(tests.cases), None)

    def _run_asserts(
        self, sandbox: Sandbox, tests: Tests, program: str, end: float
    ) -> Verdict | None:
        """Run the program and its tests side by side, in two processes connected by pipes."""
        with Group() as group:
            calls, values = group.pipe(), group.pipe()
            verdict = group.memory_file("verdict")
            group.start(sandbox, "host", program, self.limits, stdin=calls[0], stdout=values[1])
            judge = group.start(
                sandbox, "judge", tests.source, self.limits,
                stdin=values[0], stdout=calls[1], verdict=verdict,
            )  # fmt: skip
            for end_of_pipe in (*calls, *values):
                end_of_pipe.close()  # so that each process notices the end of the other
            if not group.wait([judge], end):
                return None
            verdict.seek(0)
            try:
                return Verdict(**json.loads(verdict.read()))
            except ValueError:  # such as the tests' process out of memory
                return Verdict(0, 1, f"the tests ended with exit code {judge.returncode}")


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
