"""What is finished of a run: its result and the other files in its directory.

Nothing is written, so a run can be read while it continues. Knows nothing about terminals; `lmpipe.run_directory` opens
run directories.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from lmpipe.errors import ConfigError
from lmpipe.metrics import best_index
from lmpipe.results.result import Result, StrategyOutcome, StrategyReport
from lmpipe.results.trace_log import TraceRecord, read_trace_log
from lmpipe.state import ProgramState
from lmpipe.storage.checksummed_json import read_checksummed
from lmpipe.storage.files import read_json_object

BOOTSTRAP = "95 % bootstrap intervals over seeds and examples"
"""The kind of intervals that the scores of benchmarks have."""


@final
@dataclass(frozen=True)
class FinishedRun:
    """What is finished of the run in a directory; `lmpipe.extend.open_run` returns it.

    Attributes:
        folder: Path of the directory.
        result: Content of its ``result.json``. Without one, it is made from the journal: its scores are those on
            validation examples, and there are no test scores.
        examples: The examples that traces are of: test examples or, without a ``result.json``, validation examples.
        intervals: The kind of intervals that its scores have.
        notes: Sentences about what is not finished or cannot be shown, and how experiments differ.
        beginnings: Reports of the first stages of the strategies, such as ``p`` of ``p -> w``, where these are not
            strategies of the run. They are found by their names, and are not in `result`.
        latest: Names of the strategies that can be compared with the latest result of a directory with several
            experiments: those of the same program, metric and examples. Empty stands for all.
    """

    folder: Path
    result: Result
    examples: Literal["test", "validation"] = "test"
    intervals: str = BOOTSTRAP
    notes: tuple[str, ...] = ()
    beginnings: tuple[StrategyReport, ...] = ()
    latest: tuple[str, ...] = ()

    def strategy(self, name: str | None = None) -> StrategyReport:
        """Returns the report of a strategy, or of the first stages of one.

        Args:
            name: Name of the strategy; by default the one with the best validation score, or the first if none has a
                score. Of several experiments in one directory, it is one of the latest.

        Raises:
            ConfigError: If the run has no such strategy.
        """
        rows = self.result.strategies
        if not rows:
            raise ConfigError("; ".join([f"{self.folder} has no result yet", *self.notes]))
        if name is None:
            rows = [row for row in rows if not self.latest or row.strategy in self.latest]
            return rows[best_index(row.val.mean for row in rows) or 0]
        known = [*rows, *self.beginnings]
        matches = [row for row in known if row.strategy == name]
        if not matches:
            raise ConfigError(f"{self.folder} has no strategy {name!r}; it has {', '.join(r.strategy for r in known)}")
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

    def state(self, strategy: str | None = None, seed: int | None = None) -> ProgramState:
        """Returns the final prompts and weights of a strategy on a seed; see `outcome` for the arguments."""
        return self.outcome(strategy, seed).state

    def traces(self, strategy: str | None = None, seed: int | None = None) -> Iterator[TraceRecord]:
        """Yields the traces of the final state of a strategy on a seed, one at a time, in the order of example ids.

        Args:
            strategy: Name of the strategy; see `strategy` for the default.
            seed: The seed; by default the first one.

        Raises:
            ConfigError: If the run has no such strategy or seed, or no traces of it.
            CorruptBlob: If the trace log is missing or damaged.
        """
        row, outcome = self.strategy(strategy), self.outcome(strategy, seed)
        if outcome.traces is None:
            reason = "; ".join(row.skips) or "they were not kept; BetterTogether keeps those of its stages"
            raise ConfigError(f"{self.folder} has no traces of {row.strategy!r}, seed {outcome.seed}: {reason}")
        return self.records(outcome)

    def scores(self, strategy: str | None = None, seed: int | None = None) -> dict[str, float]:
        """Returns example id → score of the final state of a strategy on a seed; see `traces` for the rest."""
        return {trace.example: trace.score for trace in self.traces(strategy, seed)}

    def prompts(self, outcome: StrategyOutcome) -> dict[str, list[tuple[str, str]]]:
        """Returns the prompt of each module: its path → messages before the inputs, as ``(role, content)``.

        They are those of the traces. Without traces, they are the instructions and demonstrations of the state, as
        ``("instructions", text)`` and ``("demonstration", JSON)``.

        Raises:
            CorruptBlob: If the trace log is missing or damaged.
        """
        return prompts_of(outcome.state) if outcome.traces is None else prompts_sent(self.records(outcome))

    def records(self, outcome: StrategyOutcome) -> Iterator[TraceRecord]:
        """Yields the traces of an outcome, one at a time, in the order of example ids; none if they were not kept.

        Raises:
            CorruptBlob: If the trace log is missing or damaged.
        """
        return iter(()) if outcome.traces is None else read_trace_log(self.folder / "blobs" / outcome.traces)

    def adapter_folder(self, adapter: str) -> Path:
        """Returns the folder of an adapter, by its digest; its content is not checked."""
        return self.folder / "blobs" / adapter


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


def prompts_of(state: ProgramState) -> dict[str, list[tuple[str, str]]]:
    """Returns the prompt of each module of a state, as ``("instructions", text)`` and ``("demonstration", JSON)``."""
    return {
        path: [
            ("instructions", prompt.instructions),
            *(("demonstration", _json(demo.model_dump(mode="json"))) for demo in prompt.demos),
        ]
        for path, prompt in state.prompts.items()
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
