"""Opens run directories for reading, while other processes may write them, and finds them."""

from __future__ import annotations

from pathlib import Path

from lmpipe.errors import ConfigError
from lmpipe.results.result import Result
from lmpipe.results.run_reader import FinishedRun
from lmpipe.results.saved import SESSION_FILE
from lmpipe.run_directory.recorded import read_recorded
from lmpipe.storage.files import explain_read_errors
from lmpipe.text.display import shorten

_FILES = ("result.json", "journal.jsonl", "config.json")


def open_run(folder: str | Path) -> FinishedRun:
    """Reads a run directory: the result of a benchmark or, without one, what its journal records.

    Nothing is locked or written, so the run may be going on. What it has finished until now is returned.

    Args:
        folder: Path of the directory.

    Raises:
        ConfigError: If the folder is not a run directory, or another version of lmpipe wrote its result.
        CorruptBlob: If its result, its splits or its journal are damaged or were edited.
        StoreError: If it cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in _FILES):
        raise ConfigError(_no_run(folder))
    path = folder / "result.json"
    run = FinishedRun(folder, Result.read(path)) if path.exists() else read_recorded(folder)
    _ = run.splits  # raises an error if they are damaged
    return run


def find_runs(folder: Path) -> list[Path]:
    """Returns the run directories in a folder, sorted by name; none if the folder is one itself or does not exist.

    Raises:
        StoreError: If the folder cannot be read.
    """
    with explain_read_errors(folder):
        if not folder.is_dir() or any((folder / name).exists() for name in _FILES):
            return []
        return sorted(path for path in folder.iterdir() if any((path / name).exists() for name in _FILES))


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} {'is a file' if folder.exists() else 'does not exist'}; pass the path of a run directory"
    if (folder / SESSION_FILE).exists():
        return (
            f"{folder} is a saved state, not a run directory; README.md shows it, and lmpipe.load('{folder}') loads it"
        )
    if runs := find_runs(folder):
        return f"{folder} is not a run directory, but contains some: {', '.join(map(str, runs))}"
    with explain_read_errors(folder):
        content = shorten(", ".join(sorted(path.name for path in folder.iterdir())), 200)
    return (
        f"{folder} is not a run directory: it has neither result.json nor journal.jsonl, but {content or 'nothing'}; a "
        "run directory is the path that the run's RunStore, optimize(..., out=...) or the benchmark's --out had"
    )
