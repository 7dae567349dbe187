"""Reads a finished run: its result and the other files in its directory.

Nothing is written, so a run can be read while it continues. Knows nothing about terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lmpipe.errors import ConfigError
from lmpipe.metrics import best_index
from lmpipe.results.result import Result, StrategyOutcome, StrategyReport
from lmpipe.results.trace_log import TraceRecord, read_trace_log
from lmpipe.storage.checksummed_json import read_checksummed
from lmpipe.storage.files import read_json_object


@final
@dataclass(frozen=True)
class FinishedRun:
    """The content of a run directory.

    Attributes:
        folder: Path of the directory.
        result: Content of its ``result.json``.
    """

    folder: Path
    result: Result

    def strategy(self, name: str | None = None) -> StrategyReport:
        """Returns the report of a strategy.

        Args:
            name: Name of the strategy; by default the one with the best validation score, or the first if none has a
                score.

        Raises:
            ConfigError: If the run has no such strategy.
        """
        rows = self.result.strategies
        if name is None and rows:
            return rows[best_index(row.val.mean for row in rows) or 0]
        matches = [row for row in rows if row.strategy == name]
        if not matches:
            raise ConfigError(f"{self.folder} has no strategy {name!r}; it has {', '.join(r.strategy for r in rows)}")
        return matches[0]

    def outcome(self, strategy: str | None = None, seed: int | None = None) -> StrategyOutcome:
        """Returns the outcome of a strategy on a seed.

        Args:
            strategy: Name of the strategy; see `strategy` for the default.
            seed: The seed; by default the first one.

        Raises:
            ConfigError: If the run has no such strategy or seed.
        """
        outcomes = self.strategy(strategy).outcomes
        matches = [outcome for outcome in outcomes if seed in (None, outcome.seed)]
        if not matches:
            raise ConfigError(f"{self.folder} has no seed {seed}; it has {', '.join(str(o.seed) for o in outcomes)}")
        return matches[0]

    @property
    def provenance(self) -> dict[str, Any]:
        """Task, LM and settings of the run, and the description of task and data in its ``config.json``.

        Raises:
            CorruptBlob: If ``config.json`` is damaged.
        """
        path = self.folder / "config.json"
        recorded = read_json_object(path) if path.exists() else {}
        recorded.pop("versions", None)
        return {"task": self.result.task, "lm": self.result.lm, "settings": self.result.config, **recorded}

    @property
    def splits(self) -> dict[str, Any]:
        """Ids of the examples of each split, by seed; empty if the run directory does not have them.

        Raises:
            ConfigError: If another version of lmpipe wrote the file.
            CorruptBlob: If the file is damaged or was edited.
        """
        path = self.folder / "splits.json"
        return read_checksummed(path) if path.exists() else {}

    def records(self, outcome: StrategyOutcome) -> Iterator[TraceRecord]:
        """Yields the traces of the test evaluation of an outcome, one at a time, in the order of example ids.

        Raises:
            CorruptBlob: If the trace log is missing or damaged.
        """
        return iter(()) if outcome.traces is None else read_trace_log(self.folder / "blobs" / outcome.traces)

    def adapter_folder(self, adapter: str) -> Path:
        """Returns the folder of an adapter, by its digest; its content is not checked."""
        return self.folder / "blobs" / adapter


def open_run(folder: Path) -> FinishedRun:
    """Reads a run directory.

    Raises:
        ConfigError: If the directory has no result of this version.
        CorruptBlob: If its result or its splits are damaged or were edited.
    """
    path = folder / "result.json"
    if not path.exists():
        clause = "is a run directory without" if (folder / "config.json").exists() else "has no"
        raise ConfigError(f"{folder} {clause} result.json; a benchmark writes it when all its strategies are finished")
    run = FinishedRun(folder, Result.read(path))
    _ = run.splits  # raises an error if they are damaged
    return run


def prompts_sent(traces: Iterable[TraceRecord]) -> dict[str, list[tuple[str, str]]]:
    """Returns the prompt of each module: its path → messages of its first call, without the last one (the inputs).

    Args:
        traces: Traces of an evaluation.

    Returns:
        Messages as ``(role, content)``.
    """
    prompts: dict[str, list[tuple[str, str]]] = {}
    for trace in traces:
        for step in trace.steps:
            if step.kind == "lm":
                prompts.setdefault(step.path, list(step.messages[:-1]))
    return prompts
