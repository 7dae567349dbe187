"""Runs to be killed: ``python -m tests.killable RUN [MODEL]`` writes the final state when it ends.

Without a model the LM and the trainer are scripted; with a model both are real. ``python -m tests.killable --serve
[warm]`` starts such runs as forks of one process, so that the imports are done only once: see `Runs`.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, final

import lmpipe
from lmpipe import Example, Predict, Prediction, RunStore, Sampling, ScriptedLM, Session, exact_match, initial_state
from lmpipe.errors import LmpipeError
from lmpipe.ledger import MEASURED
from lmpipe.storage.files import write_atomically
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune
from tests.scripted import Colour, KeepingTrainer, examples, scheduler, slow_script

STORING = {
    str(Path(lmpipe.__file__).parent / name)
    for name in (
        "storage/store.py",
        "storage/directory.py",
        "storage/blobs.py",
        "storage/journal.py",
        "storage/files.py",
        "runtime/session.py",
    )
}
"""Files of the code that stores results."""


@final
@dataclass(frozen=True)
class Start:
    """How a run is started, and when it is killed.

    Args:
        path: The run directory.
        model: Folder of a real LM; without it the LM and the trainer are scripted.
        launched: Whether the real LM is trained in another process.
        seconds: Time after which the run is killed.
        until: Glob pattern; the run is killed once the run directory has a file that matches it.
        lines: Number of the executed line of the code that stores results before which the run is killed.
        room: Largest size of a file in bytes; writing beyond it fails as if the disk were full.
    """

    path: str
    model: str | None = None
    launched: bool = False
    seconds: float | None = None
    until: str | None = None
    lines: int | None = None
    room: int | None = None


@final
@dataclass(frozen=True)
class End:
    """How a run ended: its exit status, which is negative if it was killed, and its error message."""

    status: int
    error: str = ""

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


@final
class Runs:
    """A process that starts runs as forks of itself, and kills them; a context manager.

    Args:
        warm: Whether the process imports the packages that real LMs need.
    """

    def __init__(self, *, warm: bool = False) -> None:
        command = [sys.executable, "-m", "tests.killable", "--serve", *(["warm"] if warm else [])]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, path: Path, **how: Any) -> End:
        """Starts a run and waits until it has ended. The keyword arguments are the fields of `Start`."""
        requests, replies = _pipes(self._server)
        requests.write(json.dumps(asdict(Start(str(path), **how))) + "\n")
        requests.flush()
        return End(**json.loads(replies.readline()))


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise ValueError("started without pipes")
    return process.stdin, process.stdout


def serve() -> None:
    """Reads a `Start` from each line of the input, and prints the `End` of the run."""
    for line in sys.stdin:
        start = Start(**json.loads(line))
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _run_and_exit(start, writing)
        os.close(writing)
        if start.seconds is not None or start.until is not None:
            _wait(start, child)
            os.kill(child, signal.SIGKILL)  # a run that has ended is not reaped yet, so its process id is not reused
        with os.fdopen(reading) as pipe:
            error = pipe.read()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(json.dumps(asdict(End(os.waitstatus_to_exitcode(status), error))) + "\n")
        sys.stdout.flush()


def _wait(start: Start, child: int) -> None:
    """Waits until it is time to kill a run, or until the run has ended."""
    time.sleep(start.seconds or 0)
    while start.until and not list(Path(start.path).glob(start.until)):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.001)


def _run_and_exit(start: Start, error_pipe: int) -> None:
    """Runs a fork to its end and writes an error message to a pipe. All other output is discarded."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    if start.room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (start.room, start.room))
    status = 2  # for an exception that is not an error of lmpipe
    try:
        with _killed_before(start.lines):
            whole_run(start)
        status = 0
    except LmpipeError as error:
        os.write(error_pipe, f"{type(error).__name__}: {error}".encode())
        status = 1
    finally:
        os._exit(status)


@contextmanager
def _killed_before(lines: int | None) -> Iterator[None]:
    """Kills this process before a line, by number, that its main thread executes of the code that stores results."""
    left = lines

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line" and left is not None:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename in STORING else None

    if lines is not None:
        sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def even_length(example: Example, prediction: Prediction) -> float:
    """A metric that some answers of an untrained LM pass."""
    return float(len(prediction.answer) % 2 == 0)


def scripted_run(store: RunStore) -> str:
    program, session = Colour(), Session(lm=ScriptedLM(slow_script), store=store, seed=3)
    better = scheduler(KeepingTrainer())
    result = better.optimize(program, initial_state(program, session), examples(24), examples(24, start=50), session)
    return result.state.model_dump_json()


def real_run(store: RunStore, model: str, *, launched: bool = False) -> str:
    from lmpipe.engines.local import LocalLM
    from lmpipe.engines.training import LocalTrainer, TuningConfig

    lm = LocalLM.from_pretrained(model, name="tiny")
    tuning = TuningConfig(learning_rate=0.01, epochs=40, checkpoint_steps=5, batch_size=4, dropout=0.1)
    stages = {
        "p": BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=1),
        "w": BootstrapFinetune(
            even_length, LocalTrainer(lm, tuning, (sys.executable,) if launched else ()), temperature=1.0
        ),
    }
    program = Predict("number: int -> answer")
    session = Session(lm=lm, store=store, sampling=Sampling(max_tokens=6))
    better = BetterTogether(even_length, stages, "p -> w -> p")
    result = better.optimize(program, initial_state(program, session), examples(12), examples(6, start=50), session)
    return result.state.model_dump_json()


def whole_run(start: Start) -> None:
    """Optimizes on a store and writes the state beside it."""
    store = RunStore(start.path, {"model": "real" if start.model else "scripted"})
    state = real_run(store, start.model, launched=start.launched) if start.model else scripted_run(store)
    write_atomically(store.path / "state.json", state.encode())
    store.close()


def content(path: Path) -> dict[str, bytes]:
    """Returns the files that a run leaves behind, without times."""
    files = {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in {"lock", "journal.jsonl", "journal.length"}
    }
    return files | {key: json.dumps(value, sort_keys=True).encode() for key, value in journal(path).items()}


def journal(path: Path) -> dict[str, Any]:
    lines = [json.loads(line)["records"] for line in (path / "journal.jsonl").read_bytes().splitlines()]
    keys = [key for line in lines for key in line]
    assert len(keys) == len(set(keys)), "a piece of work was done twice"
    return {key: without_clock(record) for line in lines for key, record in line.items()}


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_clock(item) for name, item in value.items() if name not in MEASURED}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        logging.basicConfig(handlers=[logging.NullHandler()])  # warnings of libraries do not matter here
        if sys.argv[2:]:
            import lmpipe.engines.local
            import lmpipe.engines.training
        gc.freeze()  # otherwise every collection of a run copies the pages of all that was imported
        serve()
    else:
        whole_run(Start(*sys.argv[1:]))
