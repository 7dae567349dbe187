"""Runs to be killed: ``python -m tests.killable START``, where START is a `Start` as JSON, writes the final state."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, final

import lmpipe
from lmpipe import Example, Predict, Prediction, RunStore, Sampling, ScriptedLM, Session, exact_match, initial_state
from lmpipe.errors import LmpipeError
from lmpipe.ledger import MEASURED
from lmpipe.storage.files import write_atomically
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune
from tests.processes import Process, start
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
        model: Folder of a real LM, which is trained; without it the LM and the trainer are scripted.
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


def run(path: Path, **how: Any) -> End:
    """Starts a run and waits until it has ended. The keyword arguments are the fields of `Start`."""
    how_started = Start(str(path), **how)
    process = start("-m", "tests.killable", json.dumps(asdict(how_started)))
    if how_started.seconds is not None or how_started.until is not None:
        _wait(how_started, process)
        process.send_signal(signal.SIGKILL)
    return End(process.wait(), process.stdout)


def _wait(how: Start, process: Process) -> None:
    """Waits until it is time to kill a run, or until the run has ended."""
    time.sleep(how.seconds or 0)
    while how.until and not list(Path(how.path).glob(how.until)) and process.poll() is None:
        time.sleep(0.001)


@contextmanager
def _room(size: int | None) -> Iterator[None]:
    """Limits the size of files in a block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def whole_run(how: Start) -> None:
    """Optimizes on a store and writes the state beside it."""
    store = RunStore(how.path, {"model": "real" if how.model else "scripted"})
    state = real_run(store, how.model, launched=how.launched) if how.model else scripted_run(store)
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


def main(how: Start) -> None:
    """Runs to the end; an error of lmpipe is the only output."""
    logging.basicConfig(handlers=[logging.NullHandler()])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        with _room(how.room), _killed_before(how.lines):
            whole_run(how)
    except LmpipeError as error:
        sys.stdout.write(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main(Start(**json.loads(sys.argv[1])))
