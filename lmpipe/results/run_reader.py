"""A finished run, to look into: its result, and what lies in its directory.

Reads only, so it may be used while the run goes on. Knows nothing of terminals.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lmpipe.errors import ConfigError, CorruptBlob, StoreError
from lmpipe.metrics import best_index
from lmpipe.results.result import Result, StrategyOutcome, StrategyReport
from lmpipe.results.trace_log import TraceRecord, read_trace_log
from lmpipe.storage.blobs import is_blob_name, is_intact
from lmpipe.storage.checksummed_json import read_checksummed
from lmpipe.storage.files import explain_read_errors, explain_write_errors, read_json_object


@final
@dataclass(frozen=True)
class FinishedRun:
    """What a run directory holds.

    Attributes:
        folder: The directory.
        result: Its ``result.json``.
    """

    folder: Path
    result: Result

    def strategy(self, name: str | None = None) -> StrategyReport:
        """A row of the table; by default the one with the best validation score, the first if none has a score.

        Raises:
            ConfigError: If there is no such row.
        """
        rows = self.result.strategies
        if name is None and rows:
            return rows[best_index(row.val.mean for row in rows) or 0]
        found = [row for row in rows if row.strategy == name]
        if not found:
            raise ConfigError(f"{self.folder} has no strategy {name!r}; it has {', '.join(r.strategy for r in rows)}")
        return found[0]

    def outcome(self, strategy: str | None = None, seed: int | None = None) -> StrategyOutcome:
        """What a strategy ended in on a seed; by default on the first.

        Raises:
            ConfigError: If there is no such strategy or seed.
        """
        outcomes = self.strategy(strategy).outcomes
        found = [one for one in outcomes if seed in (None, one.seed)]
        if not found:
            raise ConfigError(f"{self.folder} has no seed {seed}; it has {', '.join(str(o.seed) for o in outcomes)}")
        return found[0]

    @property
    def provenance(self) -> dict[str, Any]:
        """Task, LM and settings; what the run directory knows of the task and its data is part of it.

        Raises:
            CorruptBlob: If that is damaged.
        """
        path = self.folder / "config.json"
        more = read_json_object(path) if path.exists() else {}
        more.pop("versions", None)
        return {"task": self.result.task, "lm": self.result.lm, "settings": self.result.config, **more}

    @property
    def splits(self) -> dict[str, Any]:
        """Ids of the examples of each part, by seed; empty where the run directory does not have them.

        Raises:
            ConfigError: If they are of another version.
            CorruptBlob: If they are damaged, or were edited.
        """
        path = self.folder / "splits.json"
        return read_checksummed(path) if path.exists() else {}

    def records(self, outcome: StrategyOutcome) -> Iterator[TraceRecord]:
        """The test runs of an outcome, one at a time, in the order of example ids.

        Raises:
            CorruptBlob: If they are absent or damaged.
        """
        return iter(()) if outcome.traces is None else read_trace_log(self.folder / "blobs" / outcome.traces)

    def copy_adapter(self, adapter: str, target: Path) -> None:
        """Copies tuned weights.

        Raises:
            CorruptBlob: If they are absent or damaged.
            StoreError: If the target is there already or cannot be written.
        """
        source = self.folder / "blobs" / adapter
        with explain_read_errors(source):
            whole = is_blob_name(adapter) and source.is_dir() and is_intact(source)
        if not whole:
            raise CorruptBlob(
                f"{source} is absent or damaged; restore it from a copy, or delete what is there of it and start the "
                "run again: the stage is then done again"
            )
        if target.exists():
            raise StoreError(f"{target} is there already; name another folder")
        with explain_write_errors(target):
            shutil.copytree(source, target)


def open_run(folder: Path) -> FinishedRun:
    """Reads a run directory.

    Raises:
        ConfigError: If it holds no result of this version.
        CorruptBlob: If its result or its splits are damaged, or were edited.
    """
    path = folder / "result.json"
    if not path.exists():
        what = "is a run directory without" if (folder / "config.json").exists() else "has no"
        raise ConfigError(f"{folder} {what} result.json; a benchmark writes it when all its strategies are through")
    opened = FinishedRun(folder, Result.read(path))
    _ = opened.splits
    return opened


def prompts_sent(traces: Iterable[TraceRecord]) -> dict[str, list[tuple[str, str]]]:
    """Module path → the messages of its first call, as ``(role, content)``, but the last, which gives the inputs."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for trace in traces:
        for step in trace.steps:
            if step.kind == "lm":
                prompts.setdefault(step.path, list(step.messages[:-1]))
    return prompts
