"""An end to calls that never come back, wherever they are stuck."""

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
    """Ends the process when a call takes too long, since nothing can end the call alone.

    At the limit a thread says so in one line and shows all stacks. Then it interrupts the main
    thread, as Ctrl-C does: the run saves what it can and exits with code 1. If the process is
    still there after a grace, as long as the limit and `LONGEST_GRACE` at most, it ends on the
    spot, with code 1 too. A call that holds Python's global lock stops that thread as well; then
    faulthandler's, which needs no lock, shows the stacks and ends the process after the grace.

    One call at a time in a process, from any thread. `is_exceeded` says that one of them hangs.

    Args:
        seconds: Of one call; None or 0 for no limit.
        where: Says which process and step it is, once it is asked for.
        setting: What to change where calls are merely slow.
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
        """Within this, `call` is under way; the name is for the message."""
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
            if not self.is_exceeded:  # else it stays, should the process be stuck in its end
                faulthandler.cancel_dump_traceback_later()

    def _watch(self, call: str, seconds: float, grace: float, returned: threading.Event) -> None:
        if returned.wait(seconds):
            return
        self.is_exceeded = True
        report(
            f"{self.where()}: {call} has not come back for {seconds:g} s, so the run ends; look at "
            "the stacks below for where it hangs and go on from the last checkpoint, with a larger "
            f"{self.setting} if it was only slow"
        )
        faulthandler.dump_traceback(file=STDERR)
        main = threading.main_thread().ident
        if callable(signal.getsignal(signal.SIGINT)) and main is not None:
            signal.pthread_kill(main, signal.SIGINT)
            threading.Event().wait(grace)
        os._exit(1)
