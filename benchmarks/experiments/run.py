"""Runs the strategies of a benchmark on every seed, and sums up what they found.

Knows nothing of command lines, terminals or files other than the run store.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, final

from benchmarks.experiments.settings import BASELINES, Settings
from benchmarks.experiments.statistics import differences_of, holm, paired_difference, score_of
from benchmarks.experiments.task import Task
from lmpipe import LM, Evaluation, Metric, OptimizeResult, Retriever, Session, evaluate, initial_state
from lmpipe.engines.local import LocalLM
from lmpipe.engines.training import LocalTrainer
from lmpipe.events import Callback
from lmpipe.ledger import Cost
from lmpipe.progress import Progress
from lmpipe.results.result import Comparison, FindingReport, Outcome, Quality, Result, StageReport, StrategyReport
from lmpipe.storage.store import RunStore
from lmpipe.trainer import Trainer
from optimizers import VANILLA, BetterTogether

PACKAGES = ("lmpipe", "torch", "transformers", "peft", "numpy")


@final
@dataclass(frozen=True)
class Trial:
    """One strategy on one seed.

    Args:
        strategy: Which.
        seed: Which.
        result: Of its stages.
        start: What scoring the program as it is written cost, which all strategies of the seed share.
        test: Of the state it ended in; none if no stage had anything to work with, so that its scores are "—".
    """

    strategy: str
    seed: int
    result: OptimizeResult
    start: Cost
    test: Evaluation | None


def run(
    task: Task,
    lm: LM,
    trained: LocalLM | None,
    settings: Settings,
    strategies: Sequence[str],
    seeds: Sequence[int],
    store: RunStore,
    progress: Progress | None = None,
    callbacks: tuple[Callback, ...] = (),
    retriever: Retriever | None = None,
) -> Result:
    """Runs every strategy on every seed; what the store has is not done again.

    Args:
        task: Data, program and metric.
        lm: What the program runs on.
        trained: What trains its adapters, if any strategy does: `lm` itself, or another engine of the same model.
        settings: Of the stages.
        strategies: Strategy strings, such as ``"p -> w -> p"``.
        seeds: One run, with a split of its own, for each.
        store: Where results and adapters go.
        progress: Where progress is shown.
        callbacks: Are told of stages, candidates and epochs as they end.
        retriever: What the program searches, if it does.

    Returns:
        The table, its stages, and the paired differences of all strategies.
    """
    trials = [
        trial
        for seed in seeds
        for trial in run_seed(task, lm, trained, settings, strategies, seed, store, progress, callbacks, retriever)
    ]
    return Result(
        task=task.name,
        lm=lm.name,
        seeds=list(seeds),
        config=settings.model_dump(mode="json"),
        versions=versions(),
        strategies=[
            _report(strategy, [trial for trial in trials if trial.strategy == strategy], list(task.measures))
            for strategy in strategies
        ],
        comparisons=_comparisons(trials, strategies),
        findings=_findings(trials),
        cost=_cost_of_all(trials).to_json(),
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide results."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def run_seed(
    task: Task,
    lm: LM,
    trained: LocalLM | None,
    settings: Settings,
    strategies: Sequence[str],
    seed: int,
    store: RunStore,
    progress: Progress | None = None,
    callbacks: tuple[Callback, ...] = (),
    retriever: Retriever | None = None,
    tested: bool = True,
) -> list[Trial]:
    """Optimizes by every strategy on one seed's split, and scores the outcomes on its test examples.

    With ``tested=False`` it stops before that, and there are no trials.
    """
    program, metric = task.program(), task.metric()
    split = task.split(settings.train, settings.val, settings.test, seed)
    session = Session(
        lm=lm,
        seed=seed,
        sampling=settings.sampling(),
        structured=settings.structured,
        store=store,
        retriever=retriever,
        progress=progress,
        callbacks=callbacks,
    )
    trainer = None if trained is None else LocalTrainer(trained, settings.tuning)
    planned = scheduler(settings, metric, trainer, task.label)
    start = initial_state(program, session)
    asked = [VANILLA, *strategies]
    results = planned.optimize_all(asked, program, start, split.train, split.val, session)
    if not tested:
        return []
    score = partial(evaluate, metric=metric, session=session, title="test", measures=task.measures, keep_traces=True)
    tests = {
        strategy: score(program, results[strategy].state, split.test) if results[strategy].status == "done" else None
        for strategy in strategies
    }
    return [Trial(strategy, seed, results[strategy], results[VANILLA].cost, test) for strategy, test in tests.items()]


def scheduler(settings: Settings, metric: Metric, trainer: Trainer | None, label: str | None) -> BetterTogether:
    """What runs the strategies of one seed."""
    return BetterTogether(
        metric,
        settings.optimizers(metric, trainer, label),
        strategy=VANILLA,
        prompts_from=settings.prompts_from,
        select=settings.select,
        budget=settings.budget(),
        num_train_scored=settings.num_train_scored,
    )


def _report(strategy: str, trials: Sequence[Trial], measures: Sequence[str]) -> StrategyReport:
    return StrategyReport(
        strategy=strategy,
        val=score_of([_values(trial.result.evaluation) if trial.test else None for trial in trials]),
        test=score_of([_values(trial.test) for trial in trials]),
        quality={name: _quality(trials, name) for name in measures},
        stages=[_stage(trials, number) for number in range(len(trials[0].result.stages))],
        outcomes=[
            Outcome(
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


def _quality(trials: Sequence[Trial], name: str) -> Quality:
    """Means of a measure over all test runs, and over those with the full score."""
    tests = [trial.test for trial in trials]
    every = [list(test.measures[name].values()) if test else None for test in tests]
    right = [
        [value for example, value in test.measures[name].items() if test.scores[example] >= 1] if test else None
        for test in tests
    ]
    return Quality(all=score_of(every), successful=score_of(right))


def _findings(trials: Sequence[Trial]) -> list[FindingReport]:
    """What the runs have to say, each finding once: strategies that share a stage share what is found there."""
    found = [
        FindingReport(seed=trial.seed, **finding.model_dump()) for trial in trials for finding in trial.result.findings
    ]
    return list({finding.model_dump_json(): finding for finding in found}.values())


def _cost_of_all(trials: Sequence[Trial]) -> Cost:
    """What all strategies cost together; what they share, the start among it, is counted once."""
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


def _comparisons(trials: Sequence[Trial], strategies: Sequence[str]) -> list[Comparison]:
    """Every strategy against every one before it, over the seeds in which both have a score.

    Differences from a baseline of the paper's question (`BASELINES`) are tests, corrected for how many there are.
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
    found = [
        paired_difference(strategy, scores[strategy], baseline, scores[baseline])
        for number, strategy in enumerate(strategies)
        for baseline in strategies[:number]
        if differences_of(scores[strategy], scores[baseline])
    ]
    tests = [one for one in found if one.baseline in BASELINES]
    corrected = iter(holm([one.p for one in tests]))
    return [one.model_copy(update={"p_holm": next(corrected)}) if one in tests else one for one in found]


def _values(evaluation: Evaluation | None) -> list[float] | None:
    return None if evaluation is None else list(evaluation.scores.values())
