"""Time limit for calls that may hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opd_lightning.errors import report

LONGEST_GRACE = 300.0  # seconds
STDERR = 2


class TimeLimit:
    """Time limit that ends the process, since a hanging call cannot be ended by itself.

    At the limit, a thread prints one line and all stacks. Then it interrupts the main thread, as
    Ctrl-C does: the run saves what it can and exits with code 1. If the process still runs after a
    grace period, which equals the limit but at most `LONGEST_GRACE`, it exits at once, also with
    code 1. A call that holds the GIL blocks that thread too; then the thread of faulthandler, which
    does not need the GIL, prints the stacks and ends the process after the grace period.

    One call at a time in a process, from any thread. `is_exceeded` is True once a call hangs.

    Args:
        seconds: Limit of one call; None or 0 for no limit.
        where: Returns the process and step for the message.
        setting: Setting to change if calls are merely slow, for the message.
    """

    def __init__(
        self,
        seconds: float | None = None,
        where: Callable[[], str] = lambda: "this process",
        setting: str = "the limit",
    ) -> None:
        self.seconds = seconds
        self.where = where
        self.setting = setting
        self.is_exceeded = False

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        """Limit the block's duration; `call` names it in the message."""
        if not self.seconds:
            yield
            return
        grace = min(self.seconds, LONGEST_GRACE)
        returned = threading.Event()
        arguments = (call, self.seconds, grace, returned)
        threading.Thread(target=self._watch, args=arguments, daemon=True).start()
        faulthandler.dump_traceback_later(self.seconds + grace + 1, exit=True, file=STDERR)
        try:
            yield
        finally:
            returned.set()
            if not self.is_exceeded:  # else it stays armed, in case the process hangs at its exit
                faulthandler.cancel_dump_traceback_later()

    def _watch(self, call: str, seconds: float, grace: float, returned: threading.Event) -> None:
        if returned.wait(seconds):
            return
        self.is_exceeded = True
        report(
            f"{self.where()}: {call} has not returned for {seconds:g} s, so the run ends; the "
            "stacks below show where it hangs: resume from the last checkpoint, with a larger "
            f"{self.setting} if it was only slow"
        )
        faulthandler.dump_traceback(file=STDERR)
        main = threading.main_thread().ident
        if callable(signal.getsignal(signal.SIGINT)) and main is not None:
            signal.pthread_kill(main, signal.SIGINT)
            threading.Event().wait(grace)
        os._exit(1)
