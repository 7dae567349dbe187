"""Reports of trials: what an optimizer found on each seed, summarized over seeds as a `Result` has it.

Does not know where the trials come from, nor how confident their scores are: the caller passes a function for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from lmpipe.ledger import Cost
from lmpipe.optimize_result import OptimizeResult, StageResult
from lmpipe.program.evaluate import Evaluation
from lmpipe.results.result import FindingReport, MeasureReport, Score, StageReport, StrategyOutcome, StrategyReport

_SCORING = ("program", "start", "metric", "data", "settings")  # digests that decide the score of the start

ScoreOf: TypeAlias = Callable[[Sequence[Sequence[float] | None]], Score]
"""Summarizes the scores of the examples of each seed; None stands for a seed that was not scored."""


@final
@dataclass(frozen=True)
class Trial:
    """One strategy on one seed.

    Args:
        strategy: The strategy, or the name of another optimizer.
        seed: The seed.
        result: Result of its stages.
        test: Test scores of the final state; None if there are none.
    """

    strategy: str
    seed: int
    result: OptimizeResult
    test: Evaluation | None = None

    @property
    def val(self) -> Evaluation | None:
        """Validation scores of the final state; None if every stage was skipped, so that its scores are "—"."""
        return None if self.result.status == "skipped" else self.result.evaluation


def strategy_report(trials: Sequence[Trial], score_of: ScoreOf, measures: Sequence[str] = ()) -> StrategyReport:
    """Summarizes the trials of one strategy.

    Args:
        trials: At least one trial, each with another seed.
        score_of: Summarizes scores.
        measures: Names of the measures of the test examples.
    """
    return StrategyReport(
        strategy=trials[0].strategy,
        val=score_of([_values(trial.val) for trial in trials]),
        test=score_of([_values(trial.test) for trial in trials]),
        quality={name: _quality(trials, name, score_of) for name in measures},
        stages=[_stage(trials, number, score_of) for number in range(len(trials[0].result.stages))],
        outcomes=list(map(_outcome, trials)),
        cost=sum((trial.result.cost for trial in trials), Cost()).to_json(),
    )


def findings_of(trials: Sequence[Trial]) -> list[FindingReport]:
    """Returns the findings of all trials, each once: strategies that share a stage share its findings."""
    findings = [
        FindingReport(seed=trial.seed, **finding.model_dump()) for trial in trials for finding in trial.result.findings
    ]
    return list({finding.model_dump_json(): finding for finding in findings}.values())


def total_cost(trials: Sequence[Trial]) -> Cost:
    """Returns the cost of all trials together; shared stages, and the score of the start, count once."""
    costs: dict[object, Cost] = {}
    for trial in trials:
        names: tuple[str, ...] = ()
        start = trial.result.cost
        for stage in trial.result.stages:
            names += (stage.name,)
            start -= stage.cost
            costs.setdefault((trial.seed, names, work_of(stage)), stage.cost)
        costs.setdefault((trial.seed, _start_of(trial.result)), start)
    return sum(costs.values(), Cost())


def work_of(stage: StageResult) -> object:
    """Returns a value that is equal for two stages of one seed and path only if they are the same recorded work."""
    origin = stage.result.origin
    made_with = () if origin is None else (origin.program, str(origin.lm), frozenset(origin.digests.items()))
    return made_with, stage.result.state, frozenset(stage.evaluation.scores.items())


def _start_of(result: OptimizeResult) -> object:
    """Returns a value that is equal for two results of one seed only if the score of their start is the same work."""
    origin = result.origin
    made_with = origin and (origin.program, str(origin.lm), *map(origin.digests.get, _SCORING))
    return made_with, result.initial and frozenset(result.initial.scores.items())


def _outcome(trial: Trial) -> StrategyOutcome:
    scored = trial.test or trial.val
    return StrategyOutcome(
        seed=trial.seed,
        state=trial.result.state,
        modules=dict(scored.modules) if scored else {},
        traces=scored.traces if scored else None,
        cost=trial.result.cost.to_json(),
        session=None if trial.result.origin is None else trial.result.origin.session,
    )


def _quality(trials: Sequence[Trial], name: str, score_of: ScoreOf) -> MeasureReport:
    """Returns the means of a measure over all test runs, and over those with the full score."""
    tests = [trial.test for trial in trials]
    all_values = [list(test.measures[name].values()) if test else None for test in tests]
    successful = [
        [value for example, value in test.measures[name].items() if test.scores[example] >= 1] if test else None
        for test in tests
    ]
    return MeasureReport(all=score_of(all_values), successful=score_of(successful))


def _stage(trials: Sequence[Trial], number: int, score_of: ScoreOf) -> StageReport:
    stages = [trial.result.stages[number] for trial in trials]
    statuses = {stage.result.status for stage in stages}
    return StageReport(
        name=stages[0].name,
        status=statuses.pop() if len(statuses) == 1 else "mixed",
        reason=" ".join(sorted({stage.result.reason for stage in stages if stage.result.reason})),
        val=score_of([_values(stage.evaluation) if stage.result.status == "done" else None for stage in stages]),
        cost=sum((stage.cost for stage in stages), Cost()).to_json(),
        per_seed=[_details(trial.seed, stage) for trial, stage in zip(trials, stages, strict=True)],
    )


def _details(seed: int, stage: StageResult) -> dict[str, Any]:
    result, train = stage.result, stage.train_evaluation
    return {
        "seed": seed,
        "status": result.status,
        "train": None if train is None or not train.n else round(train.mean, 6),
        "stopped": result.stopped,
        "candidates": [candidate.model_dump(mode="json") for candidate in result.candidates],
        **result.details,
    }


def _values(evaluation: Evaluation | None) -> list[float] | None:
    return None if evaluation is None else list(evaluation.scores.values())
