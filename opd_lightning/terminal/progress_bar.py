"""The bar of a `Progress` on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from opd_lightning.terminal.progress import Progress

PICTURE = "{desc}: {percentage:3.0f}%|{bar}| {amount}{postfix}, {speed}, {left}"


class Bar(tqdm):
    """A bar drawn by tqdm, which places several bars, and lines above them, from any thread."""

    monitor_interval = 0  # drawn by the thread that updates the stage

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
            disable=False,  # even where `quiet.py` disables the bars of libraries
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return the values of the placeholders in `PICTURE`."""
        stage = self.stage
        values = {"n": stage.done, "total": stage.total, "postfix": stage.figures or None}
        values |= {"amount": stage.amount, "speed": stage.speed, "left": stage.left}
        return {**super().format_dict, **values}
