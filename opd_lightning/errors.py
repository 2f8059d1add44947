"""Errors written for the person who caused them: one line, what / got / expected / what to do."""

import sys
from typing import Self


class UserError(ValueError):
    """A mistake in the configuration, the data or the choice of models.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class EngineMismatchError(RuntimeError):
    """The rollout engine does not hold the weights of the trainer.

    The command line prints the message alone and exits with code 1.
    """

    @classmethod
    def of_logprobs(cls, step: int, gap: float, bound: float) -> Self:
        """They disagree on the sampled tokens by a mean of `gap` nats, more than `bound`."""
        return cls(
            f"step {step}: engine and trainer log-probs of the sampled tokens differ by "
            f"{gap:.3g} nats on average, bound {bound:.3g}; the engine has other weights, another "
            "precision or another temperature than the trainer (raise "
            "model.init_args.max_logprob_gap only if that is meant)"
        )


class NotReadyError(RuntimeError):
    """`opd check` found what would stop a run or make it learn from wrong numbers."""


class ServerAwayError(RuntimeError):
    """A server does not answer any more, and patience has run out.

    The command line prints the message alone, without a traceback, and exits with code 1.
    """


def report(message: str) -> None:
    """The one line that a user sees."""
    print(f"opd: error: {message}", file=sys.stderr)
