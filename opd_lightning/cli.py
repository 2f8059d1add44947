"""The `opd` command: which program runs, and how its errors end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from opd_lightning.commands.callback_names import install_callback_names
from opd_lightning.errors import RunStoppedError, UserError, report
from opd_lightning.run import signals
from opd_lightning.run.signals import SignalledError
from opd_lightning.terminal.quiet import quiet_libraries


def main(args: list[str] | None = None) -> None:
    """Console entry point. Exit codes: 2 for a mistake in the input, 1 for a run stopped or
    not ready to start, 143 for one that SIGTERM ended."""
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["fit"]:
        signals.listen()  # before the imports, which take their time
    # A user's own methods, next to the YAML that names them; last, so that they hide nothing.
    sys.path.append(os.getcwd())
    install_callback_names()
    quiet_libraries()
    with one_line_errors():
        if args[:1] == ["lab"]:
            from opd_lightning.lab.cli import main as lab

            lab(args[1:])
        elif args[:1] == ["serve"]:
            # Meant for trainers, but SLURM sends it to every process of a job.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            from opd_lightning.serving.serve import main as serve

            serve(args[1:])
        elif args[:1] == ["configs"]:
            from opd_lightning.commands.configs import main as configs

            configs(args[1:])
        elif args[:1] == ["compare"]:
            from opd_lightning.commands.compare import main as compare

            compare(args[1:])
        else:
            from opd_lightning.commands.lightning_cli import OPDCLI

            OPDCLI(args)
            _part()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line where the reason is known; bugs keep their traceback."""
    try:
        yield
    except (UserError, RunStoppedError) as error:
        _end(error)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except SignalledError as end:
        _part()
        sys.exit(end.code)
    except RuntimeError as error:
        from opd_lightning.processes import describe_lost_rank

        if (line := describe_lost_rank(error)) is None:
            raise
        report(line)
        sys.exit(1)
    finally:
        signals.close()


def _end(error: Exception) -> None:
    """Report an error, by one of the processes that have it, and leave together with those."""
    from opd_lightning.processes import Ending

    if getattr(error, "raised_by_all", False):
        if _rank() == 0:
            report(str(error))
        _part()
        return
    ending = Ending(str(error))
    if ending.is_first:
        report(str(error))
    if ending.wait_for_all():
        _part()


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def _part() -> None:
    """Leave the other processes when all are done; gloo may abort one that just goes."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
