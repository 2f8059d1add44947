"""Processes that are forked from inside the program, where what an input changes is not yet read.

`Warm("fit", "--config", "base.yaml", stop="fit")` starts the real entry point with these words,
which waits where `stop` says. Every `run` goes on from there, in a process of its own: nothing
before that point is done twice, and exit code and lines are those of the command.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import processes, warm_parent
from tests.fuzz.outcome import Outcome, files, touched

WALL = 15.0  # seconds of the wall for every CPU second of a limit: other programs run too
MEMORY = 6 * 2**30  # bytes of address space that a process may add to what its parent has
FILE_SIZE = 2**28  # bytes of a file


class Warm:
    """A process that waits inside the program.

    Args:
        words: The command line up to that point.
        stop: A key of `STOPS`.
        cwd: Its folder.
    """

    def __init__(self, *words: str, stop: str, cwd: Path) -> None:
        self._parent = processes.Prepared(__name__, stop, *words, cwd=cwd, env=_environment(cwd))

    def run(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        seconds: float,
        allowed: Sequence[str] = ("run", "tmp"),
        env: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Go on in a new process.

        Args:
            words: The command line, if it is read behind the stop.
            folder: Working directory, with all files of the input; `outside` beside it is watched
                too.
            seconds: CPU seconds it may take.
            allowed: Folders inside, relative, where it may write.
            env: Variables beside those of every run.
        """
        (folder / "tmp").mkdir(exist_ok=True)
        before = files(folder.parent)
        environment = {**_environment(folder), **(env or {}), "FUZZ_SECONDS": str(int(seconds))}
        process = self._parent.fork(
            __name__, *words, cwd=folder, env=environment, start_new_session=True
        )
        late = False
        try:
            process.wait(seconds * WALL)
        except subprocess.TimeoutExpired:
            late = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        out, err = process.communicate(60)
        late = late or process.wait() == -signal.SIGXCPU
        after = files(folder.parent)
        inside = [f"{folder.name}/{name}" for name in allowed]
        return Outcome(
            process.wait(),
            out.splitlines(),
            err.splitlines(),
            process.cpu_seconds,
            late,
            touched(before, after, inside),
        )

    def close(self) -> None:
        self._parent.close()


def _environment(folder: Path) -> dict[str, str]:
    # A home and a folder for temporary files of its own, so that what is left there is seen.
    home, temporary = str(folder / "home"), str(folder / "tmp")
    return {**os.environ, "HOME": home, "TMPDIR": temporary, "HF_HUB_OFFLINE": "1"}


# In the warm process --------------------------------------------------------------------------


def _wait() -> list[str]:
    """Wait until an input comes; return its words, in the process that is forked for it."""
    warm_parent.serve_stdin()
    _limit(int(os.environ["FUZZ_SECONDS"]))
    return sys.argv[1:]


def _limit(seconds: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + MEMORY
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _before_parsing() -> None:
    """Wait until the parser is built; the command line and its files are read afterwards."""
    from lightning.pytorch.loops.fit_loop import _FitLoop

    from opd_lightning.commands.known_keys import check_keys
    from opd_lightning.commands.lightning_cli import OPDCLI

    parse = OPDCLI.parse_arguments

    def parse_arguments(self: OPDCLI, parser: Any, args: Any) -> None:
        words = _wait()
        check_keys(words[0], words[1:])
        parse(self, parser, words)

    OPDCLI.parse_arguments = parse_arguments  # type: ignore[method-assign]
    _FitLoop.run = lambda self: None  # type: ignore[method-assign]


def _before_fit() -> None:
    """Wait until classes are instantiated; prompts and models are read afterwards.

    The word of an input, if it has one, is the checkpoint to go on from.
    """
    from opd_lightning.commands.trainer import Trainer

    fit = Trainer.fit

    @functools.wraps(fit)
    def waiting(self: Trainer, *args: Any, **kwargs: Any) -> None:
        if words := _wait():
            kwargs["ckpt_path"] = words[0]
        fit(self, *args, **kwargs)

    Trainer.fit = waiting  # type: ignore[method-assign]


STOPS: dict[str, Callable[[], None]] = {"parsing": _before_parsing, "fit": _before_fit}


def _main() -> None:
    STOPS[sys.argv[1]]()
    from opd_lightning.cli import main

    code: Any = 0
    try:
        main(sys.argv[2:])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if all(thread.daemon for thread in threading.enumerate()[1:]):
        os._exit(code or 0)  # taking an interpreter down costs CPU time
    sys.exit(code)


if __name__ == "__main__":
    _main()
