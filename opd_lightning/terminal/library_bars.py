"""Progress bars of other libraries, shown as stages of this program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from opd_lightning.terminal.progress import Progress


class LibraryBar:
    """Stand-in for a tqdm bar, with as much of its interface as transformers and vLLM use."""

    def __init__(self, stage: Progress, items: Iterable[Any] = ()) -> None:
        self.stage = stage
        self.items = items
        self.postfix = ""  # set by the library; not shown

    def __iter__(self) -> Iterator[Any]:
        with self.stage:
            yield from self.stage.each(self.items)

    @property
    def n(self) -> int:
        return self.stage.done

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": self.stage.elapsed}

    def update(self, more: int = 1) -> None:
        self.stage.update(more)

    def refresh(self) -> None:
        """Do nothing: `Progress` decides when to draw."""

    def close(self) -> None:
        self.stage.close()


@contextmanager
def shown_as(label: str, unit: str) -> Iterator[None]:
    """Show what transformers loads or writes within the context as a stage `label`."""
    from transformers.utils.logging import set_tqdm_hook

    def ours(_: object, args: tuple[Any, ...], how: dict[str, Any]) -> LibraryBar:
        items = args[0] if args else ()
        return LibraryBar(Progress(label, len(items), unit, within=True), items)

    theirs = set_tqdm_hook(ours)
    try:
        yield
    finally:
        set_tqdm_hook(theirs)


def vllm_bar(label: str) -> Callable[..., Any]:
    """Return a `use_tqdm` argument for vLLM that shows a stage counted in responses."""

    def ours(prompts: Iterable[Any] | None = None, *, total: int = 0, **_: object) -> Any:
        if prompts is not None:
            return prompts  # vLLM only preprocesses them here
        return LibraryBar(Progress(label, total, "response", within=True))

    return ours
