"""Errors written for the person who caused them: one line, what / got / expected / what to do."""

import sys


class UserError(ValueError):
    """A mistake in the configuration, the data or the choice of models.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class EngineMismatchError(RuntimeError):
    """The rollout engine and the trainer disagree on the log-probs of the sampled tokens."""


def report(message: str) -> None:
    """The one line that a user sees."""
    print(f"opd: error: {message}", file=sys.stderr)
