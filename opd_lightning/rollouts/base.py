"""Engine contract: token ids in, token ids and the sampler's log-probs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weight_sums import EngineSum
from opd_lightning.types import Completion


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: Divisor of the logits, in the sampler and in every loss. 0 is greedy: for
            evaluation and demonstrations.
        top_p: Nucleus mass; 1.0 samples the full distribution. Less biases policy gradients.
        top_k: Number of candidates; 0 keeps all. It is applied before `top_p`.
        max_new_tokens: Maximum number of response tokens, EOS included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"sampling.temperature: got {self.temperature}, expected >= 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p: got {self.top_p}, expected a number in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"sampling.top_k: got {self.top_k}, expected >= 0 (0 keeps all)")
        if self.max_new_tokens < 1:
            raise UserError(f"sampling.max_new_tokens: got {self.max_new_tokens}, expected >= 1")

    @property
    def is_truncated(self) -> bool:
        """Return whether some tokens of the distribution are never drawn."""
        return self.top_p < 1 or self.top_k > 0

    def check_temperature(self) -> None:
        """Raise UserError at temperature 0, by which the log-probs of losses are divided."""
        if self.temperature == 0:
            raise UserError(
                "data.sampling.temperature: got 0, by which the logits of student and teachers are "
                "divided; expected more than 0; a suite's sampling and data.teacher.sampling may "
                "be greedy"
            )


class Request(NamedTuple):
    """One response to generate. Its randomness depends on the seed only, not on other requests."""

    prompt_ids: list[int]  # [P] generation prompt included
    seed: int


class Engine(ABC):
    """Rollout engine: generates responses with weights that are pushed to it.

    The returned log-probs are those of the sampled distribution: after temperature, top-k and
    top-p. `version` is the version of the last weights loaded, -1 for the initial weights and
    after `sleep`. With `sleep_while_training`, `sleep` is called as soon as a step's rollouts are
    complete.
    """

    version: int = -1
    weights_dtype: torch.dtype = torch.float32  # dtype of its copy; known after `start`
    sleep_while_training: bool = False

    def check(self, source: ModelSource, *, max_length: int) -> None:  # noqa: B027
        """Raise what `start` would raise, as far as it is known before any weights load."""

    @abstractmethod
    def start(self, source: ModelSource, *, max_length: int) -> None:
        """Load the model of `source` for sequences of up to `max_length` tokens."""

    @abstractmethod
    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by (Hugging Face name, full tensor) pairs, tied ones once."""

    def weight_sums(self) -> list[EngineSum]:
        """Return sums of the engine's parameters; empty if they cannot be read."""
        return []

    @abstractmethod
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Return one completion per request, in the order of the requests."""

    @abstractmethod
    def sleep(self) -> None:
        """Release memory until `wake`, if supported, and reset `version`: push again after it."""

    @abstractmethod
    def wake(self) -> None:
        """Allocate the memory released by `sleep`."""

    @abstractmethod
    def close(self) -> None:
        """Free all resources, weights included; `start` may be called again."""
