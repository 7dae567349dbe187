"""A training job as files, for launchers of several processes: ``LAUNCHER -m lmpipe.engines.training.job FOLDER``.

FOLDER/job.json holds all that decides the result; FOLDER/result receives the tuned weights, FOLDER/losses.json the
losses, FOLDER/log.txt what the processes print. Knows nothing of requests or stores.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from pydantic import TypeAdapter

from lmpipe.engines.local.adapters import AdapterPool, save
from lmpipe.engines.local.attention import use
from lmpipe.engines.local.models import Source, load_model
from lmpipe.engines.training.checkpoints import last_whole
from lmpipe.engines.training.fit import LossCurve, fit, seeded
from lmpipe.engines.training.layout import EncodedRow
from lmpipe.engines.training.tuning import Tuning
from lmpipe.errors import ConfigError, EngineError
from lmpipe.files import write_whole

_POLL = 0.2  # seconds between looks at the launched processes


@final
@dataclass(frozen=True)
class Job:
    """All that decides the outcome of a training.

    Args:
        source: Where the base comes from.
        name: Identifies the base weights.
        tuning: Method and settings.
        seed: Of every random choice.
        start: Folder of tuned weights to start from, or none.
        rows: What to learn.
    """

    source: Source
    name: str
    tuning: Tuning
    seed: int
    start: str | None
    rows: tuple[EncodedRow, ...]


_JOB = TypeAdapter(Job)
_LOSSES = TypeAdapter(LossCurve)


def launch(launcher: Sequence[str], job: Job, folder: Path, advance: Callable[[int], None]) -> tuple[Path, LossCurve]:
    """Runs a job through a launcher, and waits for it.

    Returns:
        The folder of the tuned weights, and the losses.

    Raises:
        ConfigError: If there is no such launcher.
        EngineError: If it fails; the message ends with the last lines that it printed.
        StoreError: If the job cannot be written.
    """
    nearby = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = shutil.which(launcher[0], path=nearby)
    if command is None:
        raise ConfigError(f"there is no command {launcher[0]!r} to launch the training with")
    write_whole(folder / "job.json", _JOB.dump_json(job))
    last_whole(folder)  # deletes the others before several processes look
    log = folder / "log.txt"
    done = 0
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
                done = _show(folder, done, advance)
                try:
                    process.wait(_POLL)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.terminate()
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
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        if first:
            (folder / "steps.txt").write_text(str(done))

    with seeded(job.seed), pool.trainable(job.tuning.peft_config(), job.start) as tuned:
        curve = fit(tuned, job.rows, job.tuning, job.seed, folder, advance)
        if first:
            save(tuned, folder / "result", job.name)
            (folder / "losses.json").write_bytes(_LOSSES.dump_json(curve))


def _end_with_the_run() -> None:
    """Ends this process when the one that launched it is killed, so that none is left to write beside the next run."""
    os.read(0, 1)
    os._exit(1)


def _show(folder: Path, done: int, advance: Callable[[int], None]) -> int:
    """Passes on how far the processes have come."""
    path = folder / "steps.txt"
    text = path.read_text() if path.is_file() else ""
    now = int(text) if text.isdigit() else done
    advance(now - done)
    return now


if __name__ == "__main__":
    run(Path(sys.argv[1]))
