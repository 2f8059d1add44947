"""Prompts of one skill, and a share of those before it."""

from __future__ import annotations

from opd_lightning.data.mixtures import MixedPrompts
from opd_lightning.data.prompts import PromptSource


class ReplayedPrompts(MixedPrompts):
    """A file's prompts of the last of some domains, with a share of the others in every step.

    Args:
        path: Prompt file.
        domains: Domains in the order in which they are learnt; of the last, prompts are new.
        share: Of the other domains, all alike, in [0, 1]. The first domain has none.
    """

    def __init__(self, path: str, domains: list[str], share: float = 0.25) -> None:
        *before, new = domains
        sources = {"new": PromptSource(path, domains=[new])}
        if before:
            sources["replayed"] = PromptSource(path, domains=before)
        shares = {"new": 1 - share, "replayed": share}
        super().__init__(sources, shares={name: shares[name] for name in sources})
