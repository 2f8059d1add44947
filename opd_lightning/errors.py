"""Errors written for the person who caused them: one line, what / got / expected / what to do."""

import sys


class UserError(ValueError):
    """A mistake in the configuration, the data or the choice of models.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class EngineMismatchError(RuntimeError):
    """The rollout engine and the trainer disagree on the log-probs of the sampled tokens.

    Args:
        step: The optimiser step that was about to be made.
        gap: Mean absolute difference, nats.
        bound: What it may be at most.
    """

    def __init__(self, step: int, gap: float, bound: float) -> None:
        super().__init__(
            f"step {step}: engine and trainer log-probs of the sampled tokens differ by "
            f"{gap:.3g} nats on average, bound {bound:.3g}; the engine has other weights, another "
            "precision or another temperature than the trainer (raise "
            "model.init_args.max_logprob_gap only if that is meant)"
        )


def report(message: str) -> None:
    """The one line that a user sees."""
    print(f"opd: error: {message}", file=sys.stderr)
