"""The rule contract: a signal in, a signal and what happened to it out.

Axes: B rollouts of a micro-batch, R response tokens (padded).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.advantage import group_advantage
from opd_lightning.types import RolloutBatch, TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What moves the student, in response space and detached.

    A policy-gradient method's token loss is `-weight * advantage * rho`, a divergence method's is
    `weight * divergence`; both only where the mask is True.
    """

    advantage: Tensor  # [B, R] float32 nats; positive pushes the sampled token up
    weight: Tensor  # [B, R] float32, factor on the token's loss
    mask: Tensor  # [B, R] bool, tokens that take part: a part of the response mask


class Compare(NamedTuple):
    """A wish: a function of whole next-token distributions at every response token.

    `function(student_logprobs [n, V], other_logprobs [n, V] or None) -> [n]`, full log-softmaxes.
    """

    other: str | None  # whose distribution, by its name among the method's asks; None: nobody's
    function: Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A micro-batch and everything the models said about it, detached.

    `others` holds the scores a method asked for, by name: "teacher" but for GRPO, and where the
    method has them "reference" (G-OPD's), "plain" (the teacher without privileged text).
    """

    batch: RolloutBatch
    student: TokenScores
    others: Mapping[str, TokenScores]
    values: Mapping[str, Tensor]  # [B, R] per named comparison of whole distributions, nats

    @property
    def teacher(self) -> TokenScores:
        if "teacher" not in self.others:
            raise UserError(
                f"a rule or term reads the teacher's scores, but only {', '.join(self.others)} "
                "were asked; declare `needs` in the rule"
            )
        return self.others["teacher"]

    @property
    def log_ratio(self) -> Tensor:
        """d_t = log pi_T(y_t) - log pi_theta(y_t), `[B, R]` nats: positive = teacher likes it."""
        return self.teacher.logprobs - self.student.logprobs

    def outcome_advantage(self, *, normalise: bool = True) -> Tensor:
        """GRPO's advantage of the rollout within its prompt's group, `[B, R]`."""
        batch = self.batch
        advantage = group_advantage(
            batch.rewards, batch.group_mean, batch.group_std, normalise=normalise
        )
        return advantage.expand_as(batch.response_mask)


Rates = dict[str, Tensor]  # [B, R] or [B, 1] values whose means over response tokens are logged


def add_rates(rates: Rates, more: Rates) -> None:
    """Add a rule's rates; the second rule of a kind gets #2 behind the names of the first."""
    for name, value in more.items():
        times = sum(key.partition("#")[0] == name for key in rates)
        rates[f"{name}#{times + 1}" if times else name] = value


class Rule(ABC):
    """Maps a signal to a signal, and says how often it did what.

    Rules run in the order in which they are listed. What a rule reads is declared, so that a
    method that cannot give it is refused before any weight is loaded.
    """

    # No annotations here: jsonargparse resolves those of a base class in the subclass's module,
    # and where that fails it accepts anything for the subclass's own fields.
    needs_groups = False  # reads rewards relative to the prompt's other samples
    needs_rewards = False  # reads rewards
    sums_tokens = False  # adds up log-ratios of a response's tokens
    shapes_advantage = False  # changes the advantage: for policy gradients only
    corrects_sampler = False  # weighs by pi_theta / mu: for policy gradients of another policy

    @property
    def needs(self) -> tuple[str, ...]:
        """Names in `Scored.others` that it reads."""
        return ()

    @property
    def step_wide(self) -> bool:
        """Whether it looks at the whole step before it acts: see `observe`."""
        return False

    def comparisons(self) -> Mapping[str, Compare]:
        """What it reads from `Scored.values`, by name."""
        return {}

    def observe(self, signal: Signal, scored: Scored) -> Tensor | None:
        """What a step-wide rule wants to know of every micro-batch, `[M, C]` float.

        The rows of all micro-batches and ranks are concatenated and handed to `apply`. Only asked
        of rules whose `step_wide` is True, which cost the student one more forward pass.
        """
        return None

    @abstractmethod
    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        """The new signal, and rates by name, logged as `rule/<name>`."""
