"""Which prompts an optimiser step takes, as a function of the step alone."""

import torch

from opd_lightning.seeding import PROMPT_ORDER, derive_seed


class PromptOrder:
    """Endless passes over `count` prompts, each pass shuffled by its own seed.

    Positions are absolute, so any step of any run can be asked for: there is no state to save,
    no prompt is dropped at the end of a pass, and the answer is the same at every world size.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._pass = -1
        self._permutation: list[int] = []

    def take(self, start: int, number: int) -> list[int]:
        """Indices of the prompts at positions start .. start + number - 1."""
        return [self._at(position) for position in range(start, start + number)]

    def _at(self, position: int) -> int:
        nth_pass, offset = divmod(position, self.count)
        if nth_pass != self._pass:
            generator = torch.Generator().manual_seed(
                derive_seed(PROMPT_ORDER, self.seed, nth_pass)
            )
            self._permutation = torch.randperm(self.count, generator=generator).tolist()
            self._pass = nth_pass
        return self._permutation[offset]
