"""A training job as files, for launchers of several processes: ``LAUNCHER -m lmpipe.engines.training.job FOLDER``.

The launching process writes FOLDER/job.json, which determines the result, and FOLDER/stop.txt if the training should
stop early, with the reason. The launched processes write FOLDER/result with the tuned weights, FOLDER/losses.json,
FOLDER/progress.json, FOLDER/failure.json if the training diverges, and their output in FOLDER/log.txt. Knows nothing
about requests or stores.
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

from lmpipe.engines.local.adapters import AdapterPool, save_weights
from lmpipe.engines.local.attention import use_lmpipe_attention
from lmpipe.engines.local.models import ModelSource, load_model, num_layers
from lmpipe.engines.training.callbacks import TrainingObserver
from lmpipe.engines.training.checkpoints import last_complete_checkpoint
from lmpipe.engines.training.fit import FitResult, fit, seeded
from lmpipe.engines.training.packed_batch import TokenizedRow
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError, EngineError, TrainingDiverged
from lmpipe.storage.files import write_atomically
from lmpipe.trainer import Objective

_POLL_SECONDS = 0.2  # between checks of the launched processes


@final
@dataclass(frozen=True)
class TrainingJob:
    """Everything that determines the outcome of a training.

    Args:
        source: Source of the base model.
        name: Name of the base weights.
        tuning: Method and settings.
        seed: Seed of every random choice.
        start: Folder of the tuned weights to start from, or None.
        rows: Training rows.
        objective: Loss to minimize.
        max_tokens: Number of training tokens after which the training stops, or None.
    """

    source: ModelSource
    name: str
    tuning: TuningConfig
    seed: int
    start: str | None
    rows: tuple[TokenizedRow, ...]
    objective: Objective  # pydantic chooses the class whose fields match the file
    max_tokens: int | None


@final
@dataclass(frozen=True)
class _Progress:
    """The number of steps so far, and the arguments of `TrainingObserver.on_epoch_end` for each finished epoch."""

    steps: int = 0
    epochs: tuple[tuple[int, float, float | None], ...] = ()


@final
@dataclass(frozen=True)
class _Failure:
    """The contents of a `TrainingDiverged` error."""

    message: str
    step: int
    losses: tuple[float, ...]


_JOB = TypeAdapter(TrainingJob)
_FAILURE = TypeAdapter(_Failure)
_RESULT = TypeAdapter(FitResult)
_PROGRESS = TypeAdapter(_Progress)


def launch_training(
    launcher: Sequence[str], job: TrainingJob, folder: Path, observer: TrainingObserver
) -> tuple[Path, FitResult]:
    """Runs a training job in the processes of a launcher and waits until it ends.

    Args:
        launcher: Command of the launcher.
        job: The training.
        folder: Folder of the job, for its files and checkpoints.
        observer: Receives progress; may stop the training.

    Returns:
        The folder of the tuned weights, and the losses and costs.

    Raises:
        ConfigError: If the command of the launcher does not exist.
        EngineError: If the processes fail; the message ends with the last lines of their output.
        TrainingDiverged: If a loss, a gradient, a weight or a reference is NaN or infinite.
        StoreError: If the job cannot be written.
    """
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = shutil.which(launcher[0], path=search_path)
    if command is None:
        raise ConfigError(f"launcher: there is no command {launcher[0]!r}; install it, or correct its name")
    write_atomically(folder / "job.json", _JOB.dump_json(job))
    last_complete_checkpoint(folder)  # deletes unusable checkpoints before several processes read them
    for name in ("stop.txt", "progress.json", "failure.json"):
        (folder / name).unlink(missing_ok=True)
    log = folder / "log.txt"
    progress = _Progress()
    with (
        log.open("w") as output,
        subprocess.Popen(
            [command, *launcher[1:], "-m", __name__, str(folder)],
            stdin=subprocess.PIPE,  # its end tells the processes that this one has exited
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            while process.poll() is None:
                progress = _relay_progress(folder, progress, observer)
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.terminate()
    _relay_progress(folder, progress, observer)
    if (folder / "failure.json").is_file():
        failure = _FAILURE.validate_json((folder / "failure.json").read_bytes())
        raise TrainingDiverged(failure.message, failure.step, failure.losses)
    if process.returncode:
        lines = "\n".join(log.read_text().splitlines()[-20:])
        raise EngineError(
            f"the training launched with {launcher[0]} failed with exit code {process.returncode}; see {log}:\n{lines}"
        )
    return folder / "result", _RESULT.validate_json((folder / "losses.json").read_bytes())


def run_job(folder: Path) -> None:
    """Runs a job in one of the launched processes; the process of rank 0 writes the results."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    job = _JOB.validate_json((folder / "job.json").read_bytes())
    is_main = int(os.environ.get("RANK", "0")) == 0
    model, _ = load_model(job.source)
    use_lmpipe_attention(model.requires_grad_(False))
    pool = AdapterPool(model)
    if job.start is not None:
        pool.register(job.start, Path(job.start))
    reporter = _Reporter(folder, job.max_tokens, is_main=is_main)
    try:
        with seeded(job.seed), pool.trainable(job.tuning.peft_config(num_layers(model)), job.start) as tuned:
            observer = TrainingObserver(reporter.on_steps, reporter.on_epoch_end, reporter.stop_reason)
            result = fit(tuned, job.rows, job.tuning, job.seed, folder, job.objective, observer)
            if is_main:
                save_weights(tuned, folder / "result", job.name)
                (folder / "losses.json").write_bytes(_RESULT.dump_json(result))
    except TrainingDiverged as error:  # all processes raise it at the same step
        if is_main:
            write_atomically(
                folder / "failure.json", _FAILURE.dump_json(_Failure(str(error), error.step, error.losses))
            )


def _exit_with_parent() -> None:
    """Exits when the launching process has exited, so that this process cannot interfere with the next run."""
    os.read(0, 1)
    os._exit(1)


@final
class _Reporter:
    """Writes the progress of a training, and reads whether it should stop, in each of the launched processes.

    The methods are those of a `TrainingObserver`.

    Args:
        folder: Folder of the job.
        max_tokens: Token limit of the job, or None.
        is_main: Whether this process writes and reads the files.
    """

    def __init__(self, folder: Path, max_tokens: int | None, *, is_main: bool) -> None:
        self._folder, self._max_tokens, self._is_main = folder, max_tokens, is_main
        self._progress = _Progress()

    def on_steps(self, steps: int) -> None:
        """Writes the new number of steps."""
        self._write(replace(self._progress, steps=self._progress.steps + steps))

    def on_epoch_end(self, number: int, loss: float, eval_loss: float | None) -> None:
        """Writes the losses of an epoch."""
        self._write(replace(self._progress, epochs=(*self._progress.epochs, (number, loss, eval_loss))))

    def stop_reason(self, tokens: int) -> str:
        """Returns why the training should stop, the same in all processes, since no process can do a step alone."""
        if self._max_tokens is not None and tokens >= self._max_tokens:
            return "max_tokens is spent"
        path = self._folder / "stop.txt"
        reason = [path.read_text() if self._is_main and path.is_file() else ""]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(reason)
        return reason[0]

    def _write(self, progress: _Progress) -> None:
        self._progress = progress
        if self._is_main:
            write_atomically(self._folder / "progress.json", _PROGRESS.dump_json(progress))


def _relay_progress(folder: Path, previous: _Progress, observer: TrainingObserver) -> _Progress:
    """Reports the progress of the processes to the observer, and tells them to stop if the observer asks for it."""
    path = folder / "progress.json"
    progress = _PROGRESS.validate_json(path.read_bytes()) if path.is_file() else previous
    observer.on_steps(progress.steps - previous.steps)
    for epoch in progress.epochs[len(previous.epochs) :]:
        observer.on_epoch_end(*epoch)
    if reason := observer.stop_reason(0):
        write_atomically(folder / "stop.txt", reason.encode())
    return progress


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
