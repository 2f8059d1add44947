"""Prompts of a data set on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.rows import Row, rows_of_dataset
from opd_lightning.errors import UserError, reason_of
from opd_lightning.models.hub import hub_unavailable


class HubPrompts(PromptSource):
    """Rows of a data set of the hub, downloaded once by `datasets`.

    Give `revision` where a run may be resumed later: rows of another revision may differ, and
    nothing records them.

    Args:
        name: Name on the hub, such as `openai/gsm8k`.
        split: Split to read.
        subset: Configuration of the data set, such as `main`; None for the only one.
        revision: Commit, tag or branch; None for the newest.
        options: Arguments of `PromptSource`.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).exists():
            raise UserError(
                f"HubPrompts.name: got {name!r}, expected a name on the hub, such as "
                "openai/gsm8k; files and folders are read with train.path"
            )
        super().__init__("hub:" + "/".join(filter(None, (name, subset, split))), **options)
        self.hub_name = name
        self.split = split
        self.subset = subset
        self.revision = revision

    @property
    def file(self) -> None:
        return None

    def rows(self, size: int | None) -> Iterator[tuple[int, Row]]:
        """Yield the rows of the split, from the cache on disk if the hub does not answer."""
        from datasets import DownloadConfig, load_dataset

        away = hub_unavailable()
        try:
            dataset = load_dataset(
                self.hub_name,
                self.subset,
                split=self.split,
                revision=self.revision,
                download_config=DownloadConfig(local_files_only=away is not None),
            )
        except Exception as error:  # any type, from the library, the hub or the network
            reason = f"{away}, and it is not in the cache" if away else reason_of(error, 160)
            raise UserError(
                f"HubPrompts: cannot load {self.path!r}: {reason}; correct the name, or save it "
                "with Dataset.save_to_disk and give that folder as path"
            ) from error
        return rows_of_dataset(dataset, self.path)
