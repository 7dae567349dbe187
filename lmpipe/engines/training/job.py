"""A training job as files, for launchers of several processes: ``LAUNCHER -m lmpipe.engines.training.job FOLDER``.

FOLDER/job.json holds all that decides the result; FOLDER/result receives the tuned weights, FOLDER/losses.json the
losses, FOLDER/progress.json how far it has come, FOLDER/log.txt what the processes print, FOLDER/failure.json how it
diverged; FOLDER/stop.txt, if there is one, says why the training is to stop. Knows nothing of requests or stores.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from pydantic import TypeAdapter

from lmpipe.engines.local.adapters import AdapterPool, save
from lmpipe.engines.local.attention import use
from lmpipe.engines.local.models import Source, load_model
from lmpipe.engines.training.callbacks import Watch
from lmpipe.engines.training.checkpoints import last_whole
from lmpipe.engines.training.fit import LossCurve, fit, seeded
from lmpipe.engines.training.packed_batch import EncodedRow
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError, EngineError, TrainingDiverged
from lmpipe.storage.files import write_whole
from lmpipe.trainer import Objective

_POLL = 0.2  # seconds between looks at the launched processes


@final
@dataclass(frozen=True)
class TrainingJob:
    """All that decides the outcome of a training.

    Args:
        source: Where the base comes from.
        name: Identifies the base weights.
        tuning: Method and settings.
        seed: Of every random choice.
        start: Folder of tuned weights to start from, or none.
        rows: What to learn from.
        objective: What is made of them.
        max_tokens: After how many tokens of rows training stops, or none.
    """

    source: Source
    name: str
    tuning: TuningConfig
    seed: int
    start: str | None
    rows: tuple[EncodedRow, ...]
    objective: Objective  # pydantic reads the one whose fields the file has
    max_tokens: int | None


@final
@dataclass(frozen=True)
class _Progress:
    """Steps made, and the losses of each epoch that has ended."""

    steps: int = 0
    epochs: tuple[tuple[int, float, float | None], ...] = ()


@final
@dataclass(frozen=True)
class _Failure:
    """What `TrainingDiverged` says."""

    reason: str
    step: int
    losses: tuple[float, ...]


_JOB = TypeAdapter(TrainingJob)
_FAILURE = TypeAdapter(_Failure)
_LOSSES = TypeAdapter(LossCurve)
_PROGRESS = TypeAdapter(_Progress)


def launch(launcher: Sequence[str], job: TrainingJob, folder: Path, watch: Watch) -> tuple[Path, LossCurve]:
    """Runs a job through a launcher, and waits for it.

    Returns:
        The folder of the tuned weights, and the losses.

    Raises:
        ConfigError: If there is no such launcher.
        EngineError: If it fails; the message ends with the last lines that it printed.
        TrainingDiverged: See `fit`.
        StoreError: If the job cannot be written.
    """
    nearby = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = shutil.which(launcher[0], path=nearby)
    if command is None:
        raise ConfigError(f"there is no command {launcher[0]!r} to launch the training with")
    write_whole(folder / "job.json", _JOB.dump_json(job))
    last_whole(folder)  # deletes the others before several processes look
    for name in ("stop.txt", "progress.json", "failure.json"):
        (folder / name).unlink(missing_ok=True)
    log = folder / "log.txt"
    done = _Progress()
    with (
        log.open("w") as output,
        subprocess.Popen(
            [command, *launcher[1:], "-m", __name__, str(folder)],
            stdin=subprocess.PIPE,  # nothing is written: that it closes tells the processes that this one is gone
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            while process.poll() is None:
                done = _show(folder, done, watch)
                try:
                    process.wait(_POLL)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.terminate()
    _show(folder, done, watch)
    if (folder / "failure.json").is_file():
        failure = _FAILURE.validate_json((folder / "failure.json").read_bytes())
        raise TrainingDiverged(failure.reason, failure.step, failure.losses)
    if process.returncode:
        lines = "\n".join(log.read_text().splitlines()[-20:])
        raise EngineError(
            f"the training that {launcher[0]} launched ended with {process.returncode}; see {log}:\n{lines}"
        )
    return folder / "result", _LOSSES.validate_json((folder / "losses.json").read_bytes())


def run(folder: Path) -> None:
    """Does a job's work in each of the launched processes; the first one writes what comes of it."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_the_run, daemon=True).start()
    job = _JOB.validate_json((folder / "job.json").read_bytes())
    first = int(os.environ.get("RANK", "0")) == 0
    model, _ = load_model(job.source)
    use(model.requires_grad_(False))
    pool = AdapterPool(model)
    if job.start is not None:
        pool.register(job.start, Path(job.start))
    progress = _Reporter(folder, job.max_tokens, first=first)
    try:
        with seeded(job.seed), pool.trainable(job.tuning.peft_config(), job.start) as tuned:
            watch = Watch(progress.advance, progress.epoch, progress.spent)
            curve = fit(tuned, job.rows, job.tuning, job.seed, folder, job.objective, watch)
            if first:
                save(tuned, folder / "result", job.name)
                (folder / "losses.json").write_bytes(_LOSSES.dump_json(curve))
    except TrainingDiverged as error:  # in all processes at the same step
        if first:
            write_whole(folder / "failure.json", _FAILURE.dump_json(_Failure(str(error), error.step, error.losses)))


def _end_with_the_run() -> None:
    """Ends this process when the one that launched it is killed, so that none is left to write beside the next run."""
    os.read(0, 1)
    os._exit(1)


@final
class _Reporter:
    """Writes how far a training has come, and reads whether it is to stop, in each of the launched processes.

    Args:
        folder: Of the job.
        max_tokens: Of the job.
        first: Whether this is the process that writes and reads.
    """

    def __init__(self, folder: Path, max_tokens: int | None, *, first: bool) -> None:
        self._folder, self._max_tokens, self._first = folder, max_tokens, first
        self._progress = _Progress()

    def advance(self, steps: int) -> None:
        """See `Watch`."""
        self._write(replace(self._progress, steps=self._progress.steps + steps))

    def epoch(self, number: int, loss: float, eval_loss: float | None) -> None:
        """See `Watch`."""
        self._write(replace(self._progress, epochs=(*self._progress.epochs, (number, loss, eval_loss))))

    def spent(self, tokens: int) -> str:
        """See `Watch`; all processes agree, since none can make a step alone."""
        if self._max_tokens is not None and tokens >= self._max_tokens:
            return "max_tokens is spent"
        path = self._folder / "stop.txt"
        said = [path.read_text() if self._first and path.is_file() else ""]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(said)
        return said[0]

    def _write(self, progress: _Progress) -> None:
        self._progress = progress
        if self._first:
            write_whole(self._folder / "progress.json", _PROGRESS.dump_json(progress))


def _show(folder: Path, done: _Progress, watch: Watch) -> _Progress:
    """Passes on how far the processes have come, and to them that a budget is spent."""
    path = folder / "progress.json"
    now = _PROGRESS.validate_json(path.read_bytes()) if path.is_file() else done
    watch.advance(now.steps - done.steps)
    for epoch in now.epochs[len(done.epochs) :]:
        watch.epoch(*epoch)
    if reason := watch.spent(0):
        write_whole(folder / "stop.txt", reason.encode())
    return now


if __name__ == "__main__":
    run(Path(sys.argv[1]))
