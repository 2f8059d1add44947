"""Python processes of the tests that start in milliseconds: forked from a warm parent.

`start("opd_lightning", "fit", ...)` behaves like `python -m opd_lightning fit ...`, but it is
forked from a process that has imported PyTorch, Transformers, Lightning and the package, which
costs a real start about ten CPU seconds (`tests/warm_parent.py`). A test run has one such parent,
started at the first use. What a child may rely on, because the parent imports, reads signatures and
no more:

- one thread, no process group, no random state in use, no signal handler of ours;
- working directory, arguments, environment, standard streams and session of its own;
- an ordinary end: exit handlers run, and its exit code is what a shell would see.

Not the same as a real start: libraries have read the environment at import, before the child's
environment was set; signals that come during import cannot be tested. Start Python itself there.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests import warm_parent
from tests.warm_parent import END, ROOT

Stream = int | IO[Any] | None


class Process:
    """A process forked from the warm parent, with the interface of `subprocess.Popen`.

    Its process id is real, so that it can be signalled. Streams that are not given go to
    temporary files, which `communicate` returns.

    Args:
        module: Run as the main module, as by `python -m`.
        arguments: Follow on the command line.
        cwd: Working directory; None for that of the caller.
        env: The whole environment; None for that of the caller.
        stdin: A file or descriptor; None for an empty one.
        stdout: A file or descriptor; None for a temporary file.
        stderr: The same, or `subprocess.STDOUT`.
        start_new_session: Whether it leads a session and a process group.
        parent: Connection to a process that waits in `warm_parent.serve`; None for the run's.

    Attributes:
        cpu_seconds: CPU time that it took, with its children that have ended; known at its end.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        start_new_session: bool = False,
        parent: socket.socket | None = None,
    ) -> None:
        self.cpu_seconds = 0.0
        self.args = [sys.executable, "-m", module, *arguments]
        self.returncode: int | None = None
        self._captured: list[IO[bytes] | None] = [
            tempfile.TemporaryFile() if stream is None else None  # noqa: SIM115
            for stream in (stdout, stderr)
        ]
        request = {
            "module": module,
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        self._status, theirs = socket.socketpair()
        with theirs, open(os.devnull, "rb") as empty:
            out = self._captured[0] or stdout
            err = self._captured[1] or (out if stderr == subprocess.STDOUT else stderr)
            fds = [_descriptor(stream) for stream in (stdin or empty, out, err)]
            _send(parent or _parent(), request, [theirs.fileno(), *fds])
        if not (answer := self._status.recv(8)):
            raise RuntimeError("the warm parent of test processes could not fork")
        self.pid = int.from_bytes(answer, "little", signed=True)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._exit_code(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit code."""
        if (code := self._exit_code(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def _exit_code(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            answer = self._status.recv(END.size)
            self._status.close()
            if not answer:
                raise RuntimeError("the warm parent of test processes has ended")
            self.returncode, self.cpu_seconds = END.unpack(answer)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to streams that were not given."""
        self.wait(timeout)
        written = []
        for file in self._captured:
            if file is not None:
                file.seek(0)
            written.append("" if file is None else file.read().decode(errors="replace"))
        return written[0], written[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Prepared:
    """A process forked from the warm parent that goes on until it waits for requests to fork.

    It calls `warm_parent.serve_stdin` where further processes are to begin.

    Args:
        module: Run as the main module.
        arguments: Follow on the command line.
        options: Those of `Process`, without `stdin`.
    """

    def __init__(self, module: str, *arguments: str, **options: Any) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = Process(module, *arguments, stdin=theirs.fileno(), **options)

    def fork(self, module: str, *arguments: str, **options: Any) -> Process:
        """Start a `Process`, once this one waits; `module` is not run, its name is only told."""
        try:
            return Process(module, *arguments, parent=self._control, **options)
        except RuntimeError:
            out, err = self._process.communicate(60)
            told = f"{out[-2000:]}\n{err[-5000:]}"
            raise RuntimeError(f"{self._process.args[2:]} has ended:\n{told}") from None

    def close(self) -> None:
        self._control.close()
        self._process.wait(60)


def run(
    module: str, *arguments: str, timeout: float, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Start a `Process` and wait for its end, like `subprocess.run`; it is killed when late."""
    (done,) = run_together([Process(module, *arguments, **options)], timeout)
    if check and done.returncode:
        raise AssertionError(f"{done.args[2:]}: exit code {done.returncode}\n{done.stderr[-5000:]}")
    return done


def ranks(module: str, *arguments: str, count: int, **options: Any) -> list[Process]:
    """Start all ranks of a run at once, with the environment that torchrun gives them.

    Lightning's own launcher would start the second rank once the first has read its
    configuration, and that by a real start.

    Args:
        count: Processes of the run; one gets no such environment.
        options: Those of `Process`.
    """
    environment = dict(options.pop("env", None) or os.environ)
    if count == 1:
        return [Process(module, *arguments, env=environment, **options)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    return [
        Process(
            module,
            *arguments,
            env=environment | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
        )
        for rank in range(count)
    ]


def run_ranks(
    module: str, *arguments: str, count: int, timeout: float, check: bool = True, **options: Any
) -> list[subprocess.CompletedProcess[str]]:
    """Start all ranks of a run and wait for them; the first that fails ends the others."""
    done = run_together(ranks(module, *arguments, count=count, **options), timeout)
    if check and any(one.returncode for one in done):
        told = "\n".join(f"exit code {one.returncode}\n{one.stderr[-5000:]}" for one in done)
        raise AssertionError(f"{done[0].args[2:]}: {told}")
    return done


def run_together(
    processes: Sequence[Process], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Wait for all; as torchrun does, kill the rest soon after one has failed."""
    until = time.monotonic() + timeout
    try:
        while running := [process for process in processes if process.poll() is None]:
            if any(process.returncode for process in processes):
                until = min(until, time.monotonic() + 30)  # they may be about to end by themselves
            if time.monotonic() > until:
                break
            select.select([process._status for process in running], [], [], 1.0)
    finally:
        late = [process for process in processes if process.poll() is None]
        for process in late:
            process.kill()
    results = [(process, *process.communicate(60)) for process in processes]
    if late and not any(p.returncode for p in processes if p not in late):
        told = "\n".join(err[-5000:] for _, _, err in results)
        raise AssertionError(f"{processes[0].args[2:]}: not done after {timeout} s\n{told}")
    return [subprocess.CompletedProcess(p.args, p.wait(), out, err) for p, out, err in results]


def call(function: Callable[..., None], *arguments: Any, **options: Any) -> Process:
    """Start a `Process` that calls a function of a module, which pickle can name."""
    return Process(__name__, pickled(function, *arguments), **options)


def pickled(function: Callable[..., None], *arguments: Any) -> str:
    """Write a call to a file, which `call_pickled` removes; return the file."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        pickle.dump((function, arguments), file)
    return file.name


def call_ranks(
    function: Callable[..., None],
    *arguments: Any,
    count: int,
    timeout: float,
    start: Callable[..., Process] = call,
) -> None:
    """Call a function in several processes at once, with the rank as its first argument."""
    done = run_together([start(function, rank, *arguments) for rank in range(count)], timeout)
    told = "\n".join(f"exit code {one.returncode}\n{one.stderr[-5000:]}" for one in done)
    assert not any(one.returncode for one in done), told


# The warm parent --------------------------------------------------------------------------


def _parent() -> socket.socket:
    """Return this process's connection to the warm parent."""
    return _parent_of(os.getpid())


@cache
def _parent_of(process: int) -> socket.socket:
    """Connect to the warm parent of the test run, which ends when all its clients have.

    Who comes first starts it. The workers of pytest-xdist share one.
    """
    name = f"\0opd-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID', process)}"
    while True:
        ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ours.connect(name)
            return ours
        except ConnectionRefusedError:
            ours.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            try:
                listener.bind(name)
            except OSError:  # another process is about to listen
                time.sleep(0.05)
                continue
            listener.listen()
            _start_parent(listener)


def _start_parent(listener: socket.socket) -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # As `quiet_libraries` sets it before libraries are imported, where stderr is no terminal.
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.Popen(
        [sys.executable, "-m", warm_parent.__name__, str(listener.fileno())],
        cwd=ROOT,
        env={**os.environ, **quiet, "PYTHONPATH": path},
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
    )


def _descriptor(stream: Any) -> int:
    return stream if isinstance(stream, int) else int(stream.fileno())


def _send(to: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    socket.send_fds(to, [json.dumps(request).encode()], fds)


def call_pickled(file: str) -> None:
    path = Path(file)
    content = path.read_bytes()
    path.unlink()
    function, arguments = pickle.loads(content)
    function(*arguments)


if __name__ == "__main__":
    call_pickled(sys.argv[1])
