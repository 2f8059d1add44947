"""Rows of the identity lab whose privileged texts differ."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from opd_lightning.data.prompts import PromptSource, Sizes
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.lab.identity import persona
from opd_lightning.types import Prompt


class PersonaPrompts(PromptSource):
    """A file's prompts, each with the persona of one of several names as privileged text.

    The name of a row follows from its id, so that it is the same at every step.

    Args:
        path: Prompt file.
        names: Names of five letters, equally frequent.
    """

    def __init__(self, path: str, names: Sequence[str]) -> None:
        super().__init__(path)
        self.names = names

    def load(self, sizes: Sizes | None = None, checks: RowChecks | None = None) -> list[Prompt]:
        """Read every row; lengths are checked with the persona of the file, which is as long."""
        return [
            replace(prompt, privileged=persona(random.Random(prompt.id).choice(self.names)))
            for prompt in super().load(sizes, checks)
        ]
