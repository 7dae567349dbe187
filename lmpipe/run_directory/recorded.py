"""The results of optimizers that a run directory records, for runs without a ``result.json``.

These are the runs of scripts, and benchmarks that have not ended. Their scores are those on validation examples, with
intervals of `Evaluation.interval`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from lmpipe.errors import ConfigError
from lmpipe.ledger import Cost
from lmpipe.metrics import finite_values
from lmpipe.optimize_result import OptimizeResult, Origin, StageResult
from lmpipe.program.evaluate import Evaluation
from lmpipe.results.result import Result, Score
from lmpipe.results.run_reader import FinishedRun
from lmpipe.run_directory.experiments import ARROW, beginnings, rows_of
from lmpipe.run_directory.trials import Trial, findings_of, strategy_report, total_cost
from lmpipe.state import ProgramState
from lmpipe.storage.files import read_json_object
from lmpipe.storage.snapshot import read_finished
from lmpipe.text.figures import count, percent

_KEY = re.compile(r"(?P<kind>.+?) [0-9a-f]{32}(?: of (?P<state>[0-9a-f]{32}))?")
_DIGITS = 6


def read_recorded(folder: Path) -> FinishedRun:
    """Reads what is finished of the run in a directory; its notes say what is not.

    Raises:
        StoreError: If the directory cannot be read.
        CorruptBlob: If its journal or its settings are damaged.
    """
    path = folder / "config.json"
    config = read_json_object(path) if path.exists() else {}
    records = _Records(read_finished(folder))
    finished = [_finished(result, origin) for result, origin in records.results if not origin.stage]
    unfinished = list(records.unfinished())
    trials = [*finished, *(trial for trial, _ in unfinished)]
    rows = rows_of(trials)
    stages = rows_of(list(beginnings(trials)), taken=[row.name for row in rows])
    origins = [origin for _, origin in records.results]
    task, settings, versions = (_mapping(config.get(name)) for name in ("task", "settings", "versions"))
    result = Result(
        task=str(task.get("name") or _listed(one.program for one in origins)),
        lm=_listed(name for one in origins for name in one.lm.values()),
        seeds=sorted({trial.seed for trial in trials}),
        config=settings,
        versions={name: str(version) for name, version in versions.items()},
        strategies=[strategy_report(row.trials, _score_of) for row in rows],
        comparisons=[],
        findings=findings_of(trials),
        cost=total_cost(trials).to_json(),
    )
    notes = [row.difference for row in rows if row.difference]
    drawn = [row.name for row in rows if row.has_drawn_examples]
    if drawn and not (folder / "splits.json").exists():  # a benchmark always draws them by seed
        notes.append(f"the seeds of {', '.join(drawn)} have different examples")
    notes += [
        f"{trial.strategy} on seed {trial.seed} is part of a strategy that is not finished; finished stages: {names}"
        for trial, names in unfinished
    ]
    if (folder / "cells").is_dir():
        notes.append(f"its cells have run directories of their own: lmpipe show {folder / 'cells'}")
    intervals = "95 % Wilson intervals over validation examples"
    latest = origins[-1] if origins else None
    return FinishedRun(
        folder,
        result,
        "validation",
        intervals,
        (*notes, *records.remarks),
        beginnings=tuple(strategy_report(row.trials, _score_of) for row in stages),
        latest=tuple(row.name for row in rows if latest and row.is_comparable(latest)),
    )


@final
class _Records:
    """The records of a run directory.

    Args:
        records: Key → record, as `Session.record` writes it.

    Attributes:
        results: The results of optimizers, each with its origin, in the order in which they were recorded.
        remarks: Sentences about what cannot be shown.
    """

    def __init__(self, records: Mapping[str, Any]) -> None:
        matches = [(_KEY.fullmatch(key), record) for key, record in records.items()]
        recorded = [(match["kind"], match["state"], record) for match, record in matches if match]
        results = [_read(OptimizeResult.model_validate, record) for kind, _, record in recorded if kind == "optimize"]
        self.results = [(result, result.origin) for result in results if result and result.origin]
        self._evaluations = [(state, record) for kind, state, record in recorded if kind == "evaluation"]
        counts = Counter(kind for kind, _, _ in recorded if kind != "optimize")
        listed = ", ".join(count(number, kind) for kind, number in counts.items()) or "nothing"
        self.remarks: list[str] = []
        if unknown := len(results) - len(self.results):
            others = "" if self.results else f"; also recorded: {listed}"
            are = f"{count(unknown, 'result')} of optimizers {'is' if unknown == 1 else 'are'}"
            self.remarks.append(f"{are} of another version of lmpipe and not shown{others}")
        elif not self.results:
            self.remarks.append(f"no optimizer and no stage has finished; recorded so far: {listed}")
            self.remarks += self._first_score()

    def _first_score(self) -> Iterator[str]:
        """Yields a sentence about the first evaluation whose traces were kept, usually that of the initial state."""
        for _, record in self._evaluations:
            evaluation = _read(Evaluation.model_validate, record)
            if evaluation is not None and evaluation.n and evaluation.traces:
                score = percent(evaluation.mean, *evaluation.interval)
                yield f"the first evaluation scored {score} on {count(evaluation.n, 'example')}"
                return

    def unfinished(self) -> Iterator[tuple[Trial, str]]:
        """Yields the strategies of which only some stages are recorded, and the list of these stages.

        The trials are named by their last stage, since the name of the strategy is recorded when it ends.
        """
        loose = [origin for number, (_, origin) in enumerate(self.results) if origin.stage and self._is_loose(number)]
        for origin in loose:
            if not any(_is_before(origin, other) for other in loose):
                yield self._unfinished(origin)

    def _is_loose(self, number: int) -> bool:
        """Whether the result of a stage belongs to no finished strategy, and no such strategy has replaced it since."""
        result, origin = self.results[number]
        for place, (other, its) in enumerate(self.results):
            if any(stage.result.origin == origin and stage.result.cost == result.cost for stage in other.stages):
                return False
            whole = its.model_copy(update={"stage": its.strategy})
            if place > number and not its.stage and (_is_before(origin, whole) or _key(origin) == _key(whole)):
                return False
        return True

    def _unfinished(self, last: Origin) -> tuple[Trial, str]:
        latest = {_key(origin): result for result, origin in self.results}
        names = last.stage.split(ARROW)
        found: dict[str, StageResult] = {}
        state: ProgramState | None = None
        for number, name in enumerate(names, 1):
            path = ARROW.join(names[:number])
            result = latest.get(_key(last.model_copy(update={"stage": path})))
            if result is not None:
                state = state if state and result.status == "skipped" else result.state
                evaluation, cost = self._validation(state, last.val)
                found[path] = StageResult(
                    name=name,
                    result=result.model_copy(update={"state": state}),
                    evaluation=evaluation,
                    cost=result.cost + cost,
                )
        stages = tuple(found.values())
        whole = stages[-1].result.model_copy(
            update={
                "status": "skipped" if all(stage.result.status == "skipped" for stage in stages) else "done",
                "evaluation": stages[-1].evaluation,
                "stages": stages,
                "cost": sum((stage.cost for stage in stages), Cost()),
            }
        )
        return Trial(last.stage, last.seed, whole), ", ".join(found)

    def _validation(self, state: ProgramState, num_examples: int) -> tuple[Evaluation, Cost]:
        """Returns the scores of a state on validation examples and their cost; no scores if they are not recorded."""
        for digest, record in self._evaluations:
            if digest == state.digest:
                evaluation = _read(Evaluation.model_validate, record)
                if evaluation is not None and evaluation.n == num_examples and evaluation.traces:
                    return evaluation, Cost.from_json(record["cost"])
        return Evaluation(scores={}), Cost()


def _read(validate: Callable[[Any], Any], record: Any) -> Any | None:
    """Returns the value of a record; None if another version of lmpipe, or something else, wrote it."""
    try:
        return validate(record["value"])
    except (ValidationError, ConfigError, LookupError, TypeError):
        return None


def _mapping(value: object) -> dict[str, Any]:
    """Returns a JSON object as it is, and nothing of another value: scripts choose their settings freely."""
    return value if isinstance(value, dict) else {}


def _key(origin: Origin) -> tuple[str, str, int, str]:
    return origin.program, str(origin.lm), origin.seed, origin.stage


def _is_before(origin: Origin, other: Origin) -> bool:
    """Whether a stage comes before another one in the same strategy."""
    return _key(origin)[:3] == _key(other)[:3] and other.stage.startswith(origin.stage + ARROW)


def _finished(result: OptimizeResult, origin: Origin) -> Trial:
    """Returns the result of a strategy, or that of a single optimizer as its only stage."""
    if not origin.strategy and not result.stages:
        scores = result.evaluation or Evaluation(scores={})
        stage = StageResult(name=origin.optimizer, result=result, evaluation=scores, cost=result.cost)
        result = result.model_copy(update={"stages": (stage,)})
    return Trial(origin.strategy or origin.optimizer, origin.seed, result)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "—"


def _score_of(scores: Sequence[Sequence[float] | None]) -> Score:
    """Returns the mean over the examples of all seeds with its standard error and 95 % interval (Wilson 1927)."""
    seeds = [finite_values(values or ()) for values in scores]
    values = [value for seed in seeds for value in seed]
    pooled = Evaluation(scores={str(number): value for number, value in enumerate(values)})
    mean, stderr, low, high = (
        round(value, _DIGITS) if math.isfinite(value) else None
        for value in (pooled.mean, pooled.stderr, *pooled.interval)
    )
    means = [round(statistics.fmean(seed), _DIGITS) if seed else None for seed in seeds]
    return Score(mean=mean, stderr=stderr, low=low, high=high, n=len(values), per_seed=means)
