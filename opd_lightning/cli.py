"""The `opd` command: dispatch to the subcommands, and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

from opd_lightning import __version__
from opd_lightning.commands.callback_names import install_callback_names
from opd_lightning.commands.command_table import check_command, overview
from opd_lightning.errors import RunStoppedError, UserError, note, report
from opd_lightning.run import signals
from opd_lightning.run.signals import SignalledError, signal_of
from opd_lightning.terminal.imports import without_collections
from opd_lightning.terminal.output import escape_unknown_characters
from opd_lightning.terminal.quiet import quiet_libraries

PYTORCH = "torch"  # imported by a process's first command that needs it
# Errors of the file system, reported in one line wherever they are raised.
FILE_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
}  # fmt: skip


def main(args: list[str] | None = None) -> None:
    """Console entry point. Exit codes: 2 for a mistake in the input, 1 for a run stopped or
    not ready to start, 128 + n for one that signal n ended (130 Ctrl-C, 143 SIGTERM)."""
    args = sys.argv[1:] if args is None else args
    escape_unknown_characters()
    with one_line_errors():
        # Before the imports, which take seconds.
        if args[:1] != ["serve"]:  # vLLM's server ends in its own way
            signals.interrupt_on_stops()
        if args[:1] == ["fit"]:
            signals.listen()
        # For methods of the user beside their YAML; last, so that they shadow no package.
        sys.path.append(os.getcwd())
        install_callback_names()
        quiet_libraries()
        _dispatch(args)


def _dispatch(args: list[str]) -> None:
    """Run a command; import only the libraries that it needs."""
    command, rest = (args[0].replace("_", "-"), args[1:]) if args else ("", [])
    if command in ("--help", "-h"):
        print(overview())
    elif command == "--version":
        print(f"opd {__version__}")
    elif command == "lab":
        with _first_imports():
            from opd_lightning.lab.cli import main as lab

        lab(rest)
    elif command == "serve":
        # SLURM sends it to every process of a job; only trainers handle it.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        with _first_imports():
            from opd_lightning.commands.parsers import OneLineParser
            from opd_lightning.serving.serve import main as serve

        serve(rest, OneLineParser)
    elif command == "compare":
        from opd_lightning.commands.compare import main as compare

        compare(rest)
    elif command == "configs":
        from opd_lightning.commands.configs import main as configs

        configs(rest)
    else:
        _train_or_measure(command, args)


def _train_or_measure(command: str, args: list[str]) -> None:
    """Run a command of the trainer, after help and checks that need no Lightning."""
    if command.startswith("-"):  # options before a command
        from opd_lightning.commands.config_files import check_configs

        check_configs(args)
    else:
        check_command(command)
        if {"--help", "-h"} & {*args}:
            from opd_lightning.commands.command_help import page

            print(page(command))
            return
        from opd_lightning.commands.known_keys import check_keys

        check_keys(command, args[1:])
    with _first_imports():
        from opd_lightning.commands.lightning_cli import OPDCLI

    OPDCLI(["--help" if word == "--help=all" else word for word in args])
    _leave_group()


def _first_imports() -> AbstractContextManager[None]:
    """Return the context of a command's imports, which take seconds in a new process."""
    return without_collections(freeze=PYTORCH not in sys.modules)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line where the reason is known; bugs keep their traceback."""
    try:
        yield
    except (UserError, RunStoppedError) as error:
        _end(error)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except SignalledError as end:
        _leave_group()
        sys.exit(end.code)
    except KeyboardInterrupt as interrupt:
        _end_interrupted(interrupt)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning exits with 1
            _end_interrupted(end.__context__)
        raise
    except BrokenPipeError:  # as in `opd configs list | head`
        # Otherwise the flush at exit raises again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a mistake in the input
            _end(UserError(f"{str(error.filename)!r}: the name of a file or folder is too long"))
            sys.exit(2)
        if error.errno not in FILE_ERRORS:
            raise
        place = f"{str(error.filename)!r}: " if error.filename else ""
        _end(RunStoppedError(f"{place}{error.strerror}; fix the cause, or name another place"))
        sys.exit(1)
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
    message = str(error)
    if "torch" not in sys.modules:  # no process group can exist; importing it takes seconds
        report(message)
        return
    from opd_lightning.processes import Ending

    if getattr(error, "raised_by_all", False):
        if _rank() == 0:
            report(message)
        _leave_group()
        return
    ending = Ending(message)
    if ending.is_first:
        report(message)
    if ending.wait_for_all():
        _leave_group()


def _end_interrupted(interrupt: KeyboardInterrupt) -> NoReturn:
    """Exit with 128 + signal; print one line unless the run has reported what it saved."""
    number = signal_of(interrupt)
    if not getattr(interrupt, "is_reported", False) and _rank() == 0:
        note(f"{number.name}: ended before it was done")
    sys.exit(128 + number)


def _rank() -> int:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            return dist.get_rank()
    # Launchers set it before the process group exists.
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    found = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(found) if found.isdigit() else 0


def _leave_group() -> None:
    """Leave the process group when all ranks have finished; gloo may abort an earlier exit."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
