"""Rule contract: a signal in, a signal and rates for logging out.

Axes: B rollouts of a micro-batch, R response tokens (padded).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.advantage import group_advantage
from opd_lightning.types import RolloutBatch, TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """Training signal of response tokens, detached.

    The token loss of a policy-gradient method is `-weight * advantage * rho`, that of a divergence
    method is `weight * divergence`; both only where the mask is True.
    """

    advantage: Tensor  # [B, R] float32 nats; positive raises the sampled token's probability
    weight: Tensor  # [B, R] float32, factor on the token's loss
    mask: Tensor  # [B, R] bool, the selected tokens: a subset of the response mask


class Compare(NamedTuple):
    """Request for a function of full next-token distributions at every response token.

    `function(student_logprobs [n, V], other_logprobs [n, V] or None) -> [n]`, full log-softmaxes.
    """

    other: str | None  # name of the other model among the method's asks; None: student only
    function: Callable[..., Tensor]


def names_compared(comparisons: Mapping[str, Compare]) -> set[str]:
    """Return the names of the other models that are compared with the student."""
    return {compare.other for compare in comparisons.values() if compare.other is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A micro-batch with the scores of all models, detached.

    `others` holds the scores that a method asks for, by name: "teacher" for every method with a
    teacher, and, depending on the method, "reference" (G-OPD) and "plain" (the teacher without
    privileged text).
    """

    batch: RolloutBatch
    student: TokenScores
    others: Mapping[str, TokenScores]
    values: Mapping[str, Tensor]  # [B, R] per named comparison of full distributions, nats

    @property
    def teacher(self) -> TokenScores:
        if "teacher" not in self.others:
            raise UserError(
                "the method, a rule or a term reads the teacher's scores, but `asks` of the method "
                f"names {', '.join(self.others) or 'none'}; name a model 'teacher' there, and "
                "declare `needs` in the rule"
            )
        return self.others["teacher"]

    @property
    def log_ratio(self) -> Tensor:
        """d_t = log pi_T(y_t) - log pi_theta(y_t), `[B, R]` nats: positive if pi_T is larger."""
        return self.teacher.logprobs - self.student.logprobs

    def outcome_advantage(self, *, normalise: bool = True) -> Tensor:
        """Return GRPO's advantage of the rollout within its prompt's group, `[B, R]`."""
        batch = self.batch
        advantage = group_advantage(
            batch.rewards, batch.group_mean, batch.group_std, normalise=normalise
        )
        return advantage.expand_as(batch.response_mask)


Rates = dict[str, Tensor]  # [B, R] or [B, 1] values whose means over response tokens are logged


def add_rates(rates: Rates, more: Rates) -> None:
    """Add a rule's rates; those of the second rule of a kind get the suffix #2."""
    for name, value in more.items():
        times = sum(key.partition("#")[0] == name for key in rates)
        rates[f"{name}#{times + 1}" if times else name] = value


class Rule(ABC):
    """Map from a signal to a signal, with rates for logging.

    Rules run in the order in which they are listed. A rule declares its inputs, so that a method
    without them is refused before any weights are loaded.
    """

    # No annotations here: jsonargparse resolves those of a base class in the subclass's module,
    # and if that fails it accepts any value for the subclass's fields.
    needs_groups = False  # reads rewards relative to the prompt's other samples
    needs_rewards = False  # reads rewards
    sums_tokens = False  # sums log-ratios over a response's tokens
    reads_probabilities = False  # reads the teacher's probability of a token, not d_t alone
    shapes_advantage = False  # changes the advantage: for policy gradients only
    reads_entropy = False  # reads the entropy of the teacher's full distribution
    corrects_sampler = False  # weights by pi_theta / mu: for policy gradients only
    # Its statistic is the mean of (sum, count) rows and only divides all weights; without it,
    # `apply` leaves them undivided.
    divides = False
    ignores_weights = False  # multiplies weights at most, by factors that do not depend on them

    @property
    def needs(self) -> tuple[str, ...]:
        """Names in `Scored.others` that the rule reads."""
        return ()

    @property
    def step_wide(self) -> bool:
        """Return whether the rule needs statistics of the whole step: see `observe`."""
        return False

    def observes(self, step: int) -> bool:
        """Return whether a rule needs statistics of this optimiser step; by default of all."""
        return self.step_wide

    def comparisons(self) -> Mapping[str, Compare]:
        """Return the comparisons that the rule reads from `Scored.values`, by name."""
        return {}

    def names_read(self) -> set[str]:
        """Return the names of the models whose scores or distributions the rule reads."""
        return {*self.needs, *names_compared(self.comparisons())}

    def observe(self, signal: Signal, scored: Scored) -> Tensor | None:
        """Return the values that a step-wide rule needs from a micro-batch, `[M, C]` float.

        The rows of all micro-batches and ranks are concatenated and passed to `apply`. Called only
        if `observes` is True, which costs the student one more forward pass of all micro-batches
        but the first; none if the rule `divides` and those after it ignore weights.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: tensors and plain data; by default none.

        Saved by the first process, so it must be the same in all. A checkpoint from within a step
        repeats the step: `apply` must not change the state twice for one step.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Restore what `state_dict` returned; called before the first step."""

    @abstractmethod
    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        """Return the new signal, and rates by name, logged as `rule/<name>`."""
