"""Several prompt sources in one, with shares of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from opd_lightning.data.order import PromptOrder, SharedOrder, shares_at
from opd_lightning.data.prompts import PromptSource, Sizes
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.errors import UserError
from opd_lightning.losses.schedule import Schedule
from opd_lightning.types import Prompt


class MixedPrompts(PromptSource):
    """Several prompt sources, of which every step takes given shares.

    The ids of a source's prompts begin with its name, which is also the domain of rows without
    one. A step's prompts follow from seed and step alone: a resumed run, and every rank, computes
    the same. A source, or domain, is taken in passes of its own, so that a small one with a large
    share is seen more often.

    Args:
        sources: Prompt sources by name.
        shares: Shares of a step's prompts, relative to each other, or schedules of the optimiser
            step (a curriculum), one for every source or domain. None takes all prompts alike.
        by: What `shares` names: "source" or "domain".
    """

    def __init__(
        self,
        sources: dict[str, PromptSource],
        *,
        shares: dict[str, float | Schedule] | None = None,
        by: Literal["source", "domain"] = "source",
    ) -> None:
        if not sources:
            raise UserError("MixedPrompts.sources: got none, expected at least one by name")
        super().__init__("+".join(sources))
        self.sources = sources
        self.shares = shares
        self.by = by
        for name, source in sources.items():
            if "/" in name or isinstance(source, MixedPrompts):
                raise UserError(
                    f"MixedPrompts.sources: got {name!r}, expected a name without '/', of a source "
                    "that is no mixture"
                )
            source.name = name
        if shares is not None:
            shares_at(shares, 0)
            if by == "source":
                self._check_names(set(sources))

    def parts(self) -> dict[str, PromptSource]:
        return {f".sources.{name}": source for name, source in self.sources.items()}

    def load(self, sizes: Sizes | None = None, checks: RowChecks | None = None) -> list[Prompt]:
        loaded = {name: source.load(sizes, checks) for name, source in self.sources.items()}
        self.skipped = sum(source.skipped for source in self.sources.values())
        prompts = [prompt for rows in loaded.values() for prompt in rows]
        if self.shares is not None:
            self._check_names({self._label(prompt) for prompt in prompts})
        return prompts

    def order(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> PromptOrder:
        if self.shares is None:
            return super().order(prompts, per_step, seed)
        return SharedOrder([self._label(p) for p in prompts], self.shares, per_step, seed)

    def _label(self, prompt: Prompt) -> str:
        return prompt.domain if self.by == "domain" else prompt.id.partition("/")[0]

    def _check_names(self, found: set[str]) -> None:
        """Check that shares are given for what there is, and for nothing else."""
        given = set(self.shares or {})
        for name in sorted(given ^ found):
            got = "one for" if name in given else "none for"
            raise UserError(
                f"MixedPrompts.shares: got {got} {name!r}, expected those of every {self.by}: "
                f"{', '.join(sorted(found))}"
            )
