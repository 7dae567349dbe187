"""Python processes that start at once: forks of a process that has imported what takes seconds to import.

``run("-m", "benchmarks.iris", …)`` does what ``python -m benchmarks.iris …`` does. Only tests of imports, and of
variables that are read at an import or at the start of the interpreter, need a process of its own.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, final

ROOT = Path(__file__).parent.parent
IMPORTS = (
    "benchmarks.experiments.experiment",
    "lmpipe.engines.local",
    "lmpipe.engines.training",
    "lmpipe.retrieval.bm25",
    "lmpipe.retrieval.index",
    "optimizers",
    "programs",
    "rich.console",
    "sklearn.datasets",
    "typer",
)
"""Modules that the first process imports."""
_MESSAGE = 1 << 20  # bytes of a message at most


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python`` with arguments to its end. The keyword arguments are further environment variables."""
    process = start(*arguments, cwd=cwd, **environment)
    return subprocess.CompletedProcess(arguments, process.wait(), process.stdout, process.stderr)


def start(*arguments: object, cwd: Path | None = None, **environment: str) -> Process:
    """Starts ``python`` with arguments: ``-m MODULE``, ``-c CODE`` or a path, and those of the program."""
    return _server().start(list(map(str, arguments)), cwd or Path.cwd(), {**os.environ, **environment})


@final
class Process:
    """A running process, with the methods of `subprocess.Popen` that tests use. What it prints goes to two files."""

    def __init__(self, server: Server, pid: int, stdout: Path, stderr: Path) -> None:
        self.pid = pid
        self._server, self._stdout, self._stderr = server, stdout, stderr

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self._server.exit_code(self.pid, seconds=0)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end of the process and returns its exit code, which is the negative signal if it was killed."""
        code = self._server.exit_code(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(encoding="utf-8", errors="replace")


@final
class Server:
    """The process that forks, as seen from the tests."""

    def __init__(self, imports: Sequence[str]) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._exit_codes: dict[int, int] = {}
        self._folder = tempfile.TemporaryDirectory()
        with theirs, tempfile.TemporaryFile("w+") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.processes", str(theirs.fileno()), *imports],
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                },
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            started = self._connection.recv(_MESSAGE)
            printed.seek(0)
            text = printed.read()
        if text or not started:
            raise RuntimeError(f"nothing is to be printed by imports: {text}")

    def start(self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Process:
        request = json.dumps([arguments, str(cwd), dict(environment)])
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            socket.send_fds(self._connection, [request.encode()], [stdout.fileno(), stderr.fileno()])
        while not isinstance(pid := self._receive(None), int):
            pass
        self._exit_codes.pop(pid, None)  # of an earlier process with this id
        return Process(self, pid, folder / "stdout", folder / "stderr")

    def exit_code(self, pid: int, seconds: float | None) -> int | None:
        """Returns the exit code of a process, or None if it has not ended in time."""
        end = None if seconds is None else time.monotonic() + seconds
        while pid not in self._exit_codes:
            left = None if end is None else max(end - time.monotonic(), 0)
            if self._receive(left) is None:
                return None
        return self._exit_codes[pid]

    def _receive(self, seconds: float | None) -> Any:
        """Receives the id of a process that has started, or stores the exit code of one that has ended."""
        if not select.select([self._connection], [], [], seconds)[0]:
            return None
        received = self._connection.recv(_MESSAGE)
        if not received:
            raise RuntimeError("the process that starts others has ended")
        message = json.loads(received)
        if isinstance(message, list):
            self._exit_codes[message[0]] = message[1]
        return message

    def close(self) -> None:
        self._connection.close()
        self._process.wait()
        self._folder.cleanup()


@functools.cache
def _server() -> Server:
    server = Server(IMPORTS)
    atexit.register(server.close)
    return server


def _serve(connection: socket.socket) -> list[str]:
    """Forks for every request until there are no more. In a fork, returns the arguments."""
    woken, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close the connection
    while True:
        ready, _, _ = select.select([connection, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report(connection)
        if connection in ready:
            request, files, *_ = socket.recv_fds(connection, _MESSAGE, 2)
            if not request:
                sys.exit()
            if not (child := os.fork()):
                for descriptor in (woken, waking):
                    os.close(descriptor)
                connection.close()
                return _become(*json.loads(request), files)
            for file in files:
                os.close(file)
            connection.send(json.dumps(child).encode())


def _report(connection: socket.socket) -> None:
    """Sends the exit code of every fork that has ended."""
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not child:
            return
        connection.send(json.dumps([child, os.waitstatus_to_exitcode(status)]).encode())


def _become(arguments: list[str], cwd: str, environment: dict[str, str], files: Sequence[int]) -> list[str]:
    """Makes this fork what a new process would be."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def _execute(arguments: list[str]) -> None:
    """Does what ``python`` does with arguments."""
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(arguments[1], vars(sys.modules["__main__"]))  # noqa: S102
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


@final
class _End:
    """The end of the interpreter, without taking its thousands of modules apart."""

    def __init__(self) -> None:
        self._code = 1  # of a command that raises an exception
        atexit.register(self._leave)  # the first function that is registered is called last

    def after(self, arguments: list[str]) -> None:
        """Executes a command."""
        try:
            _execute(arguments)
            self._code = 0
        except SystemExit as ended:
            self._code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            raise
        except KeyboardInterrupt:
            self._code = -signal.SIGINT
            raise

    def _leave(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self._code < 0:
            signal.signal(-self._code, signal.SIG_DFL)
            os.kill(os.getpid(), -self._code)
        os._exit(self._code)


if __name__ == "__main__":
    end = _End()
    for name in sys.argv[2:]:
        import_module(name)
    gc.freeze()  # otherwise every collection of a fork copies the pages of all that was imported
    with socket.socket(fileno=int(sys.argv[1])) as from_tests:
        from_tests.send(b"0")
        command = _serve(from_tests)
    end.after(command)
