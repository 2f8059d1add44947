"""A terminal's picture of a `Progress`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from opd_lightning.terminal.progress import Progress

PICTURE = "{desc}: {percentage:3.0f}%|{bar}| {amount}{postfix}, {speed}, {left}"


class Bar(tqdm):
    """Drawn by tqdm, which keeps several apart and lines above them, from whatever thread."""

    monitor_interval = 0  # no thread of its own: who works on the stage draws it

    def __init__(self, stage: Progress) -> None:
        self.stage = stage
        super().__init__(
            desc=stage.label,
            total=stage.total,
            initial=stage.done,
            bar_format=PICTURE,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=not stage.within,
            disable=False,  # `quiet.py` may have told all of tqdm otherwise
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """Everything that the picture names."""
        stage = self.stage
        told = {"n": stage.done, "total": stage.total, "postfix": stage.figures or None}
        told |= {"amount": stage.amount, "speed": stage.speed, "left": stage.left}
        return {**super().format_dict, **told}
