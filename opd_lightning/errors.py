"""Errors for users: one line, what / got / expected / what to do."""

import re
import sys
from typing import Self, TypeVar

from opd_lightning.terminal.progress import say

Error = TypeVar("Error", bound=Exception)


class UserError(ValueError):
    """A mistake in the configuration, the data or the choice of models.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class RunStoppedError(RuntimeError):
    """A guarantee of training would be violated, so the run ends before the optimiser step.

    The command line prints the message alone and exits with code 1.
    """


class CheckpointError(RunStoppedError):
    """A checkpoint could not be written, or the folder of checkpoints could not be read.

    Raised on all ranks.
    """


class EngineMismatchError(RunStoppedError):
    """The rollout engine does not hold the weights of the trainer."""

    @classmethod
    def of_logprobs(cls, step: int, gap: float, bound: float) -> Self:
        """Build for a mean gap of `gap` nats on the sampled tokens, more than `bound`."""
        return cls(
            f"step {step}: engine and trainer log-probs of the sampled tokens differ by "
            f"{gap:.3g} nats on average, bound {bound:.3g}; the engine has other weights, another "
            "precision or another temperature than the trainer (raise "
            "model.init_args.max_logprob_gap only if that is meant)"
        )


class CollapseError(RunStoppedError):
    """Responses left their allowed ranges and did not return to them; raised on all ranks."""


class NotReadyError(RunStoppedError):
    """`opd check` found a problem that would stop a run or make it train on wrong values."""


class ServerAwayError(RunStoppedError):
    """A server no longer answers, and the time limit has passed."""


class PushLostError(ServerAwayError):
    """A server was lost while weights were pushed to it; the push may be repeated."""


class StaleRolloutsError(RunStoppedError):
    """Rollouts were sampled from weights that the optimiser step may not learn from.

    Args:
        step: Index of the optimiser step.
        version: Number of optimiser steps that made the weights they were sampled from.
        max_staleness: Number of steps by which those weights may be older than the newest.
    """

    def __init__(self, step: int, version: int, max_staleness: int) -> None:
        expected = f"version {step}" + (f" or {step - 1}" if max_staleness else "")
        super().__init__(
            f"step {step}: got rollouts of weights of version {version}, expected {expected} "
            f"(data.max_staleness {max_staleness}); the engine did not take the weights that were "
            "pushed to it, or does not say so"
        )


def raised_by_all(error: Error) -> Error:
    """Mark an error that every rank raises, so that only one of them reports it."""
    error.raised_by_all = True  # type: ignore[attr-defined]
    return error


def shortened(text: str, limit: int = 400) -> str:
    """Return a text as one printable line of at most `limit` characters.

    Words longer than a path is likely to be are cut first, then the middle of the line: it begins
    with the place of a mistake and ends with what to do. Characters that a terminal would act on
    or not show are written as Python escapes them.
    """
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    if len(line) > limit:
        line = re.sub(r"\S{161,}", lambda word: f"{word[0][:120]}...", line)
    if len(line) > limit:
        line = f"{line[: limit - 125]} ... {line[-120:]}"
    return line


def cut(text: str, limit: int = 80) -> str:
    """Return a text, or its beginning and "...", of at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def reason_of(error: BaseException, length: int = 200) -> str:
    """Return the message of a library's error in one line, cut to `length` characters.

    An error without a message is named by its class.
    """
    return " ".join(str(error).split())[:length] or type(error).__name__


def is_panic(error: BaseException) -> bool:
    """Return whether a Rust library panicked; a panic is not an `Exception`."""
    return type(error).__name__ == "PanicException"


def report(message: str) -> None:
    """Print an error as one line, shortened."""
    print(f"opd: error: {shortened(message)}", file=sys.stderr)


def note(message: str) -> None:
    """Print one line of information that requires no action."""
    say(f"opd: {message}")
