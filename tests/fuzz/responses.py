"""What others write to a run: models, to verifiers; and servers, to the clients of a trainer."""

from __future__ import annotations

import contextlib
import io
import math
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import clients, texts
from tests.fuzz.kinds import Input, Kind
from tests.fuzz.outcome import Outcome
from tests.fuzz.stand_in import Reply, StandIn, reply

VERIFIERS = {
    "MathVerifier": lambda v: v.MathVerifier(
        max_workers=1, timeout_seconds=10.0, step_seconds=60.0
    ),
    "ExactMatch": lambda v: v.ExactMatch(),
    "ExactMatch with a pattern": lambda v: v.ExactMatch(r"answer:\s*(\S+)"),
    "ExactMatch of the lab": lambda v: v.ExactMatch(r";(-?\d+)$", ignore_case=True),
    "ExactMatch that backtracks": lambda v: v.ExactMatch(r"(a+)+$", timeout_seconds=1.0),
    "RegexMatch": lambda v: v.RegexMatch(r"\bi am\s+bot\b", ignore_case=True),
    "RegexMatch of many parts": lambda v: v.RegexMatch("a*" * 40 + "b", timeout_seconds=1.0),
}


class Responses(Kind):
    """Verifiers give a reward in [0, 1] or NaN; clients raise one line or have the numbers sent."""

    name = "responses"
    seconds = 150.0  # of the wall: most of it is waiting

    def __init__(self) -> None:
        self._verifiers: dict[str, Any] = {}
        self._stand_in: StandIn | None = None

    def prepare(self, base: Path) -> None:
        from tests.conftest import build_tiny_model

        (base / "model").mkdir()
        build_tiny_model(base / "model", hidden_size=32, layers=1, seed=0, tie=True)
        self._stand_in = StandIn()

    def close(self) -> None:
        if self._stand_in is not None:
            self._stand_in.close()
        for verifier in self._verifiers.values():
            workers = getattr(verifier, "workers", None) or verifier.pattern.workers
            workers.close()

    def make(self, random: Random, base: Path) -> Input:
        if random.random() < 0.5:
            return _for_verifier(random)
        return clients.made(random, str(base / "model"))

    def run(self, given: Input, base: Path, folder: Path) -> Outcome:
        call = self._verify if "verifier" in given.facts else self._ask
        began = time.monotonic()
        with _caught(self.seconds) as caught:
            caught.ignored = call(given, base, folder)
        return Outcome(
            caught.code,
            (),
            caught.lines,
            time.monotonic() - began,
            caught.late,
            places=given.places and (self._stand_in.place, *given.places),  # type: ignore[union-attr]
            ignored=caught.ignored,
        )

    def _verify(self, given: Input, base: Path, folder: Path) -> str:
        from opd_lightning import verifiers
        from opd_lightning.types import Prompt
        from opd_lightning.verifiers.base import checked_rewards

        name = given.facts["verifier"]
        verifier = self._verifiers.get(name) or VERIFIERS[name](verifiers)
        self._verifiers[name] = verifier
        answer = given.files["answer"].decode("utf-8", "surrogatepass")
        text = given.files["text"].decode("utf-8", "surrogatepass")
        prompt = Prompt(id="p", messages=({"role": "user", "content": "?"},), answer=answer)
        for rewards in (
            checked_rewards(verifier, [prompt], verifier.verify([prompt], [text])),
            verifier.verify([], []),
        ):
            for reward in rewards:
                if not (math.isnan(reward) or 0 <= reward <= 1):
                    return f"the reward is {reward}"
        found = verifier.answers([text])
        if found is not None and not all(one is None or isinstance(one, str) for one in found):
            return f"the answers are {found!r:.200}"
        return ""

    def _ask(self, given: Input, base: Path, folder: Path) -> str:
        assert self._stand_in is not None
        client, model = clients.CLIENTS[given.facts["client"]], str(base / "model")
        replies = {path: reply(body) for path, body in client.answers(model).items()}
        replies[given.facts["route"]] = Reply(given.files["reply"], **given.facts["how"])
        self._stand_in.replies = replies
        return client.ask(f"http://{self._stand_in.place}", model, folder, given.files["body"])


class _Caught:
    def __init__(self) -> None:
        self.code, self.late, self.ignored = 0, False, ""
        self.lines: list[str] = []


@contextlib.contextmanager
def _caught(seconds: float) -> Iterator[_Caught]:
    """End what runs inside as the program would: with an exit code and lines."""
    from opd_lightning.cli import one_line_errors

    caught, err = _Caught(), io.StringIO()

    def late(*_: Any) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stderr(err), one_line_errors():
            yield caught
    except _LateError:
        caught.late = True
    except SystemExit as end:
        caught.code = int(end.code or 0)
    except Exception:
        caught.code = 1
        err.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        caught.lines = err.getvalue().splitlines()


class _LateError(BaseException):
    pass


# Verifiers --------------------------------------------------------------------------------------


def _for_verifier(random: Random) -> Input:
    name = random.choice([*VERIFIERS])
    text, answer = texts.text(random), random.choice(texts.ANSWERS)
    files = {
        "text": text.encode("utf-8", "surrogatepass"),
        "answer": answer.encode("utf-8", "surrogatepass"),
    }
    return Input(f"{name}: {text!r:.60}", files, facts={"verifier": name})
