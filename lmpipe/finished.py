"""A finished run, to look into: its result, and what lies in its directory.

Reads only, so it may be used while the run goes on. Knows nothing of terminals.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from lmpipe.errors import ConfigError, CorruptBlob, StoreError
from lmpipe.files import writing
from lmpipe.hashing import content_digest
from lmpipe.ranking import best
from lmpipe.result import Outcome, Result, StrategyReport
from lmpipe.tracelog import TraceRecord, read_log


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
            return rows[best(row.val.mean for row in rows) or 0]
        found = [row for row in rows if row.strategy == name]
        if not found:
            raise ConfigError(f"{self.folder} has no strategy {name!r}; it has {', '.join(r.strategy for r in rows)}")
        return found[0]

    def outcome(self, strategy: str | None = None, seed: int | None = None) -> Outcome:
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
    def made_with(self) -> dict[str, Any]:
        """Task, LM and settings; what the run directory knows of the task and its data is part of it."""
        path = self.folder / "config.json"
        more = json.loads(path.read_bytes()) if path.is_file() else {}
        more.pop("versions", None)
        return {"task": self.result.task, "lm": self.result.lm, "settings": self.result.config, **more}

    def traces(self, outcome: Outcome) -> list[TraceRecord]:
        """The test runs of an outcome, in the order of example ids.

        Raises:
            CorruptBlob: If they are absent or damaged.
        """
        return [] if outcome.traces is None else read_log(self.folder / "blobs" / outcome.traces)

    def copy_adapter(self, adapter: str, target: Path) -> None:
        """Copies tuned weights.

        Raises:
            CorruptBlob: If they are absent or damaged.
            StoreError: If the target is there already or cannot be written.
        """
        source = self.folder / "blobs" / adapter
        if not source.is_dir() or content_digest(source) != adapter:
            raise CorruptBlob(f"{source} is absent or damaged; run the stage again")
        if target.exists():
            raise StoreError(f"{target} is there already; name another folder")
        with writing(target):
            shutil.copytree(source, target)


def open_run(folder: Path) -> FinishedRun:
    """Reads a run directory.

    Raises:
        ConfigError: If it holds no result of this version.
    """
    path = folder / "result.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no result.json; a benchmark writes it when all its strategies are through")
    try:
        return FinishedRun(folder, Result.model_validate_json(path.read_bytes()))
    except ValidationError as error:
        what = "damaged" if error.errors()[0]["type"] == "json_invalid" else "of another version"
        raise ConfigError(f"{path} is {what}: {error.errors()[0]['msg']}; run it again") from error


def prompts_sent(traces: Iterable[TraceRecord]) -> dict[str, list[tuple[str, str]]]:
    """Module path → the messages of its first call, as ``(role, content)``, but the last, which gives the inputs."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for trace in traces:
        for step in trace.steps:
            if step.kind == "lm":
                prompts.setdefault(step.path, list(step.messages[:-1]))
    return prompts
