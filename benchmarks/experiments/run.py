"""Runs the strategies of an experiment on every seed, and summarizes their scores.

Does not depend on command lines, terminals or files other than the run store.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.experiments.spec import ExperimentSpec, LoadedModels, versions
from benchmarks.experiments.statistics import holm, paired_difference, paired_differences, score_of
from benchmarks.experiments.strategies import BASELINES, VANILLA_STRATEGY
from lmpipe import Metric, Session, evaluate, initial_state
from lmpipe.engines.training import LocalTrainer
from lmpipe.events import Callback
from lmpipe.progress import Progress
from lmpipe.results.result import Comparison, Result
from lmpipe.run_directory.trials import Trial, findings_of, strategy_report, total_cost
from lmpipe.storage.store import RunStore
from lmpipe.trainer import Trainer
from optimizers import BetterTogether, Strategy


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
            strategy_report([trial for trial in trials if trial.strategy == str(strategy)], score_of, measures)
            for strategy in spec.strategies
        ],
        comparisons=_comparisons(trials, spec.strategies),
        findings=findings_of(trials),
        cost=total_cost(trials).to_json(),
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
        list(dict.fromkeys([VANILLA_STRATEGY, *spec.strategies])), program, start, split.train, split.val, session
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
    return [Trial(str(strategy), seed, results[strategy], evaluation) for strategy, evaluation in tests.items()]


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


def _comparisons(trials: Sequence[Trial], strategies: Sequence[Strategy]) -> list[Comparison]:
    """Compares every strategy with those before it, over the seeds in which both have a score.

    Differences from one of `BASELINES` are tests, whose p-values are corrected for the number of tests.
    """
    scores = {
        strategy: {
            (trial.seed, example): score
            for trial in trials
            if trial.strategy == str(strategy) and trial.test
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
