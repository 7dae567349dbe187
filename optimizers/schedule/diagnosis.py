"""Diagnosis of a run: explains in words what went wrong, from the results of the stages.

It looks for failures that Soylu et al. 2024 (arXiv 2407.10930) do not analyse: too few successful traces, successful
traces of one class only, over-fitting, a stage that lowers the score, no gain from alternating. Knows nothing about how
a report shows the findings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmpipe import Evaluation
from lmpipe.extend import CommonFailure, Finding, StageResult, dominant_failure, finite_values
from optimizers.schedule.strategy import VANILLA, Strategy

MIN_SOLVED_SHARE = 0.1  # minimum share of examples with a successful rollout
_Z = statistics.NormalDist().inv_cdf(0.975)  # half-width of a 95 % interval, in standard errors


def diagnose(
    strategy: Strategy, first: Evaluation, stages: Sequence[StageResult], tunes: Mapping[str, str]
) -> Iterator[Finding]:
    """Yields the findings about a run that a researcher should know.

    Args:
        strategy: The strategy that ran.
        first: Evaluation of the initial state.
        stages: Results of the stages.
        tunes: Stage name → whether it tunes prompts, weights or both.
    """
    yield from _failing(VANILLA, first)
    before = first
    for prefix, stage in zip(strategy.prefixes(), stages, strict=True):
        path = str(prefix)
        if stage.result.stopped:
            yield _stopped(path, stage)
        yield from _few_traces(path, stage.result.details)
        yield from _collapse(path, stage.result.details)
        yield from _over_fit(path, stage)
        if stage.result.status == "done":
            yield from _failing(path, stage.evaluation)
        yield from _worse(path, before, stage.evaluation)
        before = stage.evaluation
    if len({tunes[name] for name in strategy.stages}) > 1 and all(stage.result.status == "done" for stage in stages):
        yield from _no_gain(strategy, stages)


def paired_interval(scores: Mapping[str, float], baseline: Mapping[str, float]) -> tuple[float, float, float]:
    """Returns the mean paired difference on the common examples, and its 95 % interval by the normal approximation.

    Differences that are not finite are left out. With fewer than two differences the bounds are infinite.
    """
    differences = finite_values(scores[name] - baseline[name] for name in scores if name in baseline)
    if len(differences) < 2:
        return statistics.fmean(differences or [math.nan]), -math.inf, math.inf
    mean = statistics.fmean(differences)
    half = _Z * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def _stopped(path: str, stage: StageResult) -> Finding:
    ended_early = f"{stage.result.stopped}, so the stage ended early with the best state so far"
    message = ended_early if stage.result.status == "done" else stage.result.reason
    return Finding(kind="budget", stage=path, message=message, advice="a larger budget, or a comparison at this one")


def no_choice_finding(strategy: Strategy, examples: int) -> Finding:
    """Returns the finding for a run that should select the best state, but has no fully scored state.

    Args:
        strategy: The strategy that ran.
        examples: Number of validation examples.
    """
    message = f"no state was scored on all {examples} validation examples, so the initial state is the result"
    return Finding(kind="no choice", stage=str(strategy), message=message, advice="a larger budget")


def _failing(path: str, evaluation: Evaluation) -> Iterator[Finding]:
    total = evaluation.n + evaluation.failures.get("budget", 0)
    failure = dominant_failure(evaluation.common_failures, total)
    if failure is not None:
        message = f"on validation examples {failure.summary(total)}"
        yield Finding(kind="failing", stage=path, message=message, advice=failure.advice)


def _few_traces(path: str, details: Mapping[str, Any]) -> Iterator[Finding]:
    if "solved" not in details:
        return
    modules = [name for name, count in details["kept_by_module"].items() if not count]
    lacking = [f"module {name}" for name in modules] + [
        f"{label} = {value}"
        for label, counts in details["kept_by_label"].items()
        for value, count in counts.items()
        if not count
    ]
    if details["solved"] >= MIN_SOLVED_SHARE * details["examples"] and not lacking:
        return
    kept, tried, solved, examples = (details[name] for name in ("kept", "tried", "solved", "examples"))
    message = f"{kept} of {tried} rollouts succeeded, on {solved} of {examples} examples"
    if kept and lacking:
        message += f"; none for {', '.join(lacking)}"
    advice = (
        "more rollouts per example, a higher temperature, vary_demos, structured completions, a prompt stage before "
        "this one, or a teacher"
    )
    failures = [CommonFailure.model_validate(failure) for failure in details.get("failures", ())]
    common = dominant_failure(failures, tried)
    if common is not None:
        message, advice = f"{message}: {common.summary(tried)}", common.advice
    yield Finding(kind="few traces", stage=path, message=message, advice=advice)


def _collapse(path: str, details: Mapping[str, Any]) -> Iterator[Finding]:
    if details.get("kept", 0) < 2:
        return
    several = any(len(counts) > 1 for counts in details["kept_by_label"].values())
    if several and details["answers"] == 1:
        message = f"all {details['kept']} successful rollouts give the same answer, so training teaches only this one"
        advice = "vary_demos, max_rollouts_per_example and balance_by add rollouts and rows with other answers"
        yield Finding(kind="class collapse", stage=path, message=message, advice=advice)


def _over_fit(path: str, stage: StageResult) -> Iterator[Finding]:
    train, val = stage.train_evaluation, stage.evaluation
    if train is not None and train.n > 1 and val.n > 1:
        gap, error = train.mean - val.mean, math.hypot(train.stderr, val.stderr)
        if gap - _Z * error > 0:
            message = f"{_points(train.mean)} % on training examples and {_points(val.mean)} % on validation examples"
            advice = "more training examples, fewer epochs, eval_fraction with early stopping, or a smaller rank"
            yield Finding(kind="over-fit", stage=path, message=message, advice=advice)
    for key, training in stage.result.details.get("training", {}).items():
        losses = finite_values(training["eval_losses"])
        if len(losses) > 1 and losses[-1] > 1.1 * min(losses):
            message = f"the loss of {key} on held-out rows rose from {min(losses):.3f} to {losses[-1]:.3f}"
            advice = "the best epoch was kept; fewer epochs or a lower learning rate save the time of the others"
            yield Finding(kind="over-fit", stage=path, message=message, advice=advice)


def _worse(path: str, before: Evaluation, after: Evaluation) -> Iterator[Finding]:
    change, low, high = paired_interval(after.scores, before.scores)
    if high < 0:
        message = f"the score fell by {_points(-change)} points (95 % interval {_points(-high)} to {_points(-low)})"
        advice = (
            "select='best' keeps the state before it; after a weight stage, end with a prompt stage: tuned weights "
            "need other prompts"
        )
        yield Finding(kind="worse", stage=path, message=message, advice=advice)


def _no_gain(strategy: Strategy, stages: Sequence[StageResult]) -> Iterator[Finding]:
    """Yields a finding if the last state is not shown to be better than the one after the first stage alone."""
    alone, last = stages[0].evaluation, stages[-1].evaluation
    gain, low, high = paired_interval(last.scores, alone.scores)
    if low <= 0 and all(map(math.isfinite, (low, alone.mean, last.mean))):
        message = (
            f"after {strategy.stages[0]} alone {_points(alone.mean)} %, after all stages {_points(last.mean)} %: a "
            f"difference of {_points(gain)} points (95 % interval {_points(low)} to {_points(high)}) does not "
            "show a gain"
        )
        advice = "more validation examples to see smaller gains; otherwise the shorter strategy is as good and cheaper"
        yield Finding(kind="no gain", stage=str(strategy), message=message, advice=advice)


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
