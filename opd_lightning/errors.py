"""Errors written for the person who caused them: one line, what / got / expected / what to do."""

import sys
from typing import Self, TypeVar

from opd_lightning.terminal.progress import say

Error = TypeVar("Error", bound=Exception)


class UserError(ValueError):
    """A mistake in the configuration, the data or the choice of models.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class RunStoppedError(RuntimeError):
    """A promise of training was about to be broken, so the run ends before the optimiser moves.

    The command line prints the message alone and exits with code 1.
    """


class CheckpointError(RunStoppedError):
    """A checkpoint could not be written, or the folder of checkpoints could not be read.

    Raised on all processes alike.
    """


class EngineMismatchError(RunStoppedError):
    """The rollout engine does not hold the weights of the trainer."""

    @classmethod
    def of_logprobs(cls, step: int, gap: float, bound: float) -> Self:
        """They disagree on the sampled tokens by a mean of `gap` nats, more than `bound`."""
        return cls(
            f"step {step}: engine and trainer log-probs of the sampled tokens differ by "
            f"{gap:.3g} nats on average, bound {bound:.3g}; the engine has other weights, another "
            "precision or another temperature than the trainer (raise "
            "model.init_args.max_logprob_gap only if that is meant)"
        )


class CollapseError(RunStoppedError):
    """The run's responses left their bands and did not come back; raised on all processes."""


class NotReadyError(RunStoppedError):
    """`opd check` found what would stop a run or make it learn from wrong numbers."""


class ServerAwayError(RunStoppedError):
    """A server does not answer any more, and patience has run out."""


class PushLostError(ServerAwayError):
    """A server was lost while weights were pushed to it; they may be pushed again."""


class StaleRolloutsError(RunStoppedError):
    """Rollouts were not written by the weights that the step may learn from.

    Args:
        step: The optimiser step that was about to be made.
        version: Optimiser steps that made the weights which wrote them.
        max_staleness: How many steps older than the newest they may be.
    """

    def __init__(self, step: int, version: int, max_staleness: int) -> None:
        expected = f"version {step}" + (f" or {step - 1}" if max_staleness else "")
        super().__init__(
            f"step {step}: got rollouts of weights of version {version}, expected {expected} "
            f"(data.max_staleness {max_staleness}); the engine did not take the weights that were "
            "pushed to it, or does not say so"
        )


def raised_by_all(error: Error) -> Error:
    """Mark an error that every process of a run raises, so that one of them reports it."""
    error.raised_by_all = True  # type: ignore[attr-defined]
    return error


def report(message: str) -> None:
    """The one line that a user sees."""
    print(f"opd: error: {message}", file=sys.stderr)


def note(message: str) -> None:
    """One line about what a user should know and need not answer."""
    say(f"opd: {message}")
