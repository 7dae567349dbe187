"""Runs the strategies of an experiment on every seed, and summarizes their scores.

Does not depend on command lines, terminals or files other than the run store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from benchmarks.experiments.spec import ExperimentSpec, LoadedModels, versions
from benchmarks.experiments.statistics import holm, paired_difference, paired_differences, score_of
from benchmarks.experiments.strategies import BASELINES, VANILLA_STRATEGY
from lmpipe import Evaluation, Metric, OptimizeResult, Session, evaluate, initial_state
from lmpipe.engines.training import LocalTrainer
from lmpipe.events import Callback
from lmpipe.ledger import Cost
from lmpipe.progress import Progress
from lmpipe.results.result import (
    Comparison,
    FindingReport,
    MeasureReport,
    Result,
    StageReport,
    StrategyOutcome,
    StrategyReport,
)
from lmpipe.storage.store import RunStore
from lmpipe.trainer import Trainer
from optimizers import BetterTogether, Strategy


@final
@dataclass(frozen=True)
class Trial:
    """One strategy on one seed.

    Args:
        strategy: The strategy.
        seed: The seed.
        result: Result of its stages.
        start: Cost of scoring the program as it is written, which all strategies of the seed share.
        test: Test scores of the final state; None if every stage was skipped, so that its scores are "—".
    """

    strategy: Strategy
    seed: int
    result: OptimizeResult
    start: Cost
    test: Evaluation | None


def run(
    spec: ExperimentSpec,
    models: LoadedModels,
    store: RunStore,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Runs every strategy on every seed; work that is already in the store is not repeated.

    Args:
        spec: The experiment.
        models: Its models and its retriever.
        store: Store of results and adapters.
        progress: Shows progress.
        callbacks: Called with each event.

    Returns:
        The table, its stages, and the paired differences of all strategies.
    """
    trials = [trial for seed in spec.seeds for trial in run_seed(spec, models, seed, store, progress, callbacks)]
    measures = list(spec.task.measures)
    return Result(
        task=spec.task.name,
        lm=models.lm.name,
        seeds=list(spec.seeds),
        config=spec.settings.model_dump(mode="json"),
        versions=versions(),
        strategies=[
            _report(strategy, [trial for trial in trials if trial.strategy == strategy], measures)
            for strategy in spec.strategies
        ],
        comparisons=_comparisons(trials, spec.strategies),
        findings=_findings(trials),
        cost=_cost_of_all(trials).to_json(),
    )


def run_seed(
    spec: ExperimentSpec,
    models: LoadedModels,
    seed: int,
    store: RunStore,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    test: bool = True,
) -> list[Trial]:
    """Optimizes with every strategy on the split of one seed, and scores the final states on its test examples.

    Args:
        spec: The experiment.
        models: Its models and its retriever.
        seed: The seed.
        store: Store of results and adapters.
        progress: Shows progress.
        callbacks: Called with each event.
        test: Whether the final states are scored; if not, there are no trials.
    """
    task, settings = spec.task, spec.settings
    program, metric = task.program(), task.metric()
    split = task.split(settings.train, settings.val, settings.test, seed)
    session = Session(
        lm=models.lm,
        seed=seed,
        sampling=settings.sampling(),
        structured=settings.structured,
        store=store,
        retriever=models.retriever,
        progress=progress,
        callbacks=tuple(callbacks),
        quiet=True,  # the caller reports, once for all seeds
    )
    trainer = None if models.trained is None else LocalTrainer(models.trained, settings.tuning)
    start = initial_state(program, session)
    results = scheduler(spec, metric, trainer).optimize_all(
        [VANILLA_STRATEGY, *spec.strategies], program, start, split.train, split.val, session
    )
    if not test:
        return []
    score = partial(evaluate, metric=metric, session=session, title="test", measures=task.measures, keep_traces=True)
    tests = {
        strategy: score(program, split.test, state=results[strategy].state)
        if results[strategy].status == "done"
        else None
        for strategy in spec.strategies
    }
    vanilla = results[VANILLA_STRATEGY].cost
    return [Trial(strategy, seed, results[strategy], vanilla, evaluation) for strategy, evaluation in tests.items()]


def scheduler(spec: ExperimentSpec, metric: Metric, trainer: Trainer | None) -> BetterTogether:
    """Returns the optimizer that runs all strategies of one seed."""
    settings = spec.settings
    return BetterTogether(
        metric,
        settings.optimizers(metric, trainer, spec.task.label),
        strategy=VANILLA_STRATEGY,
        prompts_from=settings.prompts_from,
        select=settings.select,
        budget=settings.budget(),
        num_train_scored=settings.num_train_scored,
    )


def _report(strategy: Strategy, trials: Sequence[Trial], measures: Sequence[str]) -> StrategyReport:
    return StrategyReport(
        strategy=str(strategy),
        val=score_of([_values(trial.result.evaluation) if trial.test else None for trial in trials]),
        test=score_of([_values(trial.test) for trial in trials]),
        quality={name: _quality(trials, name) for name in measures},
        stages=[_stage(trials, number) for number in range(len(trials[0].result.stages))],
        outcomes=[
            StrategyOutcome(
                seed=trial.seed,
                state=trial.result.state,
                modules=dict(trial.test.modules) if trial.test else {},
                traces=trial.test.traces if trial.test else None,
                cost=trial.result.cost.to_json(),
            )
            for trial in trials
        ],
        cost=sum((trial.result.cost for trial in trials), Cost()).to_json(),
    )


def _quality(trials: Sequence[Trial], name: str) -> MeasureReport:
    """Returns the means of a measure over all test runs, and over those with the full score."""
    tests = [trial.test for trial in trials]
    all_values = [list(test.measures[name].values()) if test else None for test in tests]
    successful = [
        [value for example, value in test.measures[name].items() if test.scores[example] >= 1] if test else None
        for test in tests
    ]
    return MeasureReport(all=score_of(all_values), successful=score_of(successful))


def _findings(trials: Sequence[Trial]) -> list[FindingReport]:
    """Returns the findings of all trials, each once: strategies that share a stage share its findings."""
    findings = [
        FindingReport(seed=trial.seed, **finding.model_dump()) for trial in trials for finding in trial.result.findings
    ]
    return list({finding.model_dump_json(): finding for finding in findings}.values())


def _cost_of_all(trials: Sequence[Trial]) -> Cost:
    """Returns the cost of all strategies together; shared stages, and the score of the start, count once."""
    costs = {(trial.seed, ()): trial.start for trial in trials} | {
        (trial.seed, tuple(stage.name for stage in trial.result.stages[: number + 1])): trial.result.stages[number].cost
        for trial in trials
        for number in range(len(trial.result.stages))
    }
    return sum(costs.values(), Cost())


def _stage(trials: Sequence[Trial], number: int) -> StageReport:
    stages = [trial.result.stages[number] for trial in trials]
    statuses = {stage.result.status for stage in stages}
    done = [_values(stage.evaluation) if stage.result.status == "done" else None for stage in stages]
    return StageReport(
        name=stages[0].name,
        status=statuses.pop() if len(statuses) == 1 else "mixed",
        reason=" ".join(sorted({stage.result.reason for stage in stages if stage.result.reason})),
        val=score_of(done),
        cost=sum((stage.cost for stage in stages), Cost()).to_json(),
        per_seed=[_details(trial, number) for trial in trials],
    )


def _details(trial: Trial, number: int) -> dict[str, Any]:
    stage = trial.result.stages[number]
    result, train = stage.result, stage.train_evaluation
    return {
        "seed": trial.seed,
        "status": result.status,
        "train": None if train is None or not train.n else round(train.mean, 6),
        "stopped": result.stopped,
        "candidates": [candidate.model_dump(mode="json") for candidate in result.candidates],
        **result.details,
    }


def _comparisons(trials: Sequence[Trial], strategies: Sequence[Strategy]) -> list[Comparison]:
    """Compares every strategy with those before it, over the seeds in which both have a score.

    Differences from one of `BASELINES` are tests, whose p-values are corrected for the number of tests.
    """
    scores = {
        strategy: {
            (trial.seed, example): score
            for trial in trials
            if trial.strategy == strategy and trial.test
            for example, score in trial.test.scores.items()
        }
        for strategy in strategies
    }
    comparisons = [
        paired_difference(str(strategy), scores[strategy], str(baseline), scores[baseline])
        for number, strategy in enumerate(strategies)
        for baseline in strategies[:number]
        if paired_differences(scores[strategy], scores[baseline])
    ]
    baselines = set(map(str, BASELINES))
    tests = [comparison for comparison in comparisons if comparison.baseline in baselines]
    corrected = iter(holm([test.p for test in tests]))
    return [
        comparison.model_copy(update={"p_holm": next(corrected)}) if comparison in tests else comparison
        for comparison in comparisons
    ]


def _values(evaluation: Evaluation | None) -> list[float] | None:
    return None if evaluation is None else list(evaluation.scores.values())
