"""Diagnosis of one stage: whether it had successful rollouts to learn from, and whether it learned.

Knows the figures that optimizers report in their details, but neither the optimizers nor the other stages;
`optimizers.schedule.advice` knows what to do about a finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from lmpipe import Evaluation
from lmpipe.extend import (
    Z_95,
    CommonFailure,
    FailureCounts,
    Finding,
    StageResult,
    dominant_failure,
    finite_values,
    paired_interval,
    percent,
)
from optimizers.schedule.advice import (
    StageContext,
    against_failure,
    less_fitting,
    more_learning,
    more_successes,
    number_of,
)
from optimizers.schedule.loss_curve import loss_curve

MIN_SOLVED_SHARE = 0.1  # minimum share of examples with a successful rollout
_ROLLOUT_FIGURES = {"tried", "kept", "examples", "solved", "kept_by_module", "kept_by_label", "answers"}
_DIVERGED = "diverged"  # in figures of training: the error message, as in `optimizers.weights.settings`


@final
@dataclass(frozen=True)
class StageDiagnosis:
    """Finds what a researcher should know about one stage.

    Args:
        path: The strategy up to and including the stage.
        context: Settings of the stage.
        initial: Evaluation of the state before all stages.
        before: Evaluation of the state before the stage.
        stage: Result of the stage.
    """

    path: str
    context: StageContext
    initial: Evaluation
    before: Evaluation
    stage: StageResult

    def skipped(self) -> Finding:
        """Returns the finding about a stage that was skipped."""
        result = self.stage.result
        if result.stopped:
            return self._stopped(result.reason)
        rewards, kept = [step.get("mean_reward") for step in self._steps], self._rollouts.get("kept", 0)
        if diverged := self._diverged():
            advice = more_learning(self.context, next(iter(diverged)), 0, diverging=True)
        elif (rewards and set(rewards) == {1.0}) or 0 < kept == self._rollouts["tried"]:
            advice = "training examples that the program does not always solve"
        else:
            advice = self._for_successes()
        return Finding(kind="skipped", stage=self.path, message=result.reason, advice=advice)

    def findings(self) -> Iterator[Finding]:
        """Yields the findings about a stage that was not skipped."""
        if stopped := self.stage.result.stopped:
            yield self._stopped(f"{stopped}, so the stage ended early with the best state so far")
        if not (self._prompts and self._did_well()):
            yield from self._few_traces()
            yield from self._collapse()
        yield from self._no_learning()
        yield from self._over_fit()

    @property
    def _prompts(self) -> bool:
        return self.context.optimizer.tunes == "prompts"

    def _did_well(self) -> bool:
        """Whether all answers are right after the stage, or significantly more than before all stages."""
        after = self.stage.evaluation
        return after.mean == 1 or paired_interval(after.scores, self.initial.scores)[1] > 0

    def _stopped(self, message: str) -> Finding:
        advice = "a larger budget, or a comparison of all strategies at this one"
        return Finding(kind="budget", stage=self.path, message=message, advice=advice)

    @property
    def _details(self) -> Mapping[str, Any]:
        return self.stage.result.details

    @property
    def _rollouts(self) -> Mapping[str, Any]:
        """Figures of the rollouts (`optimizers.rollouts.Rollouts.details`); empty if the optimizer reports none."""
        return self._details if self._details.keys() >= _ROLLOUT_FIGURES else {}

    @property
    def _steps(self) -> list[Mapping[str, Any]]:
        """Details of the steps of an optimizer that reports them, each with its rollouts and its training."""
        steps = self._details.get("steps")
        return [step for step in steps if isinstance(step, Mapping)] if isinstance(steps, list) else []

    def _trainings(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Returns weight key and figures of each training; some optimizers train once, others in each step."""
        return [
            (key, figures)
            for details in (self._details, *self._steps)
            if isinstance(details.get("training"), Mapping)
            for key, figures in details["training"].items()
            if isinstance(figures, Mapping) and figures.keys() >= {"steps", "losses", "eval_losses"}
        ]

    def _diverged(self) -> dict[str, str]:
        """Returns weight key → error message of its first training that diverged."""
        trainings = reversed(self._trainings())
        return {key: figures[_DIVERGED] for key, figures in trainings if _DIVERGED in figures}

    def _failures(self) -> tuple[tuple[CommonFailure, ...], int]:
        """Returns the common failures of the rollouts that the stage learned from, and the number of rollouts."""
        counts, tried = FailureCounts(), 0
        for details in (self._rollouts, *self._steps):
            counts.merge(map(CommonFailure.model_validate, details.get("failures", ())))
            tried += details.get("tried", 0)
        return counts.most_common(), tried

    def _for_successes(self) -> str:
        """Returns what to do about rollouts that teach nothing."""
        failures, tried = self._failures()
        common = dominant_failure(failures, tried)
        if common is not None:
            return against_failure(common, self.context.program, self.context.session, self.stage.cost.modules)
        threshold = number_of(self.context.settings, "metric_threshold") or 0
        partial_scores = any(0 < score < threshold for score in self.before.scores.values())
        return more_successes(self.context, failures, partial_scores=partial_scores)

    def _few_traces(self) -> Iterator[Finding]:
        details = self._rollouts
        if not details:
            return
        lacking = [f"module {name}" for name, count in details["kept_by_module"].items() if not count] + [
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
        common = dominant_failure(self._failures()[0], tried)
        if same_failure(common, dominant_failure(self.before.common_failures, self.before.n)):
            return  # it was reported before the stage
        message += f": {common.summary(tried)}" if common else ""
        yield Finding(kind="few traces", stage=self.path, message=message, advice=self._for_successes())

    def _collapse(self) -> Iterator[Finding]:
        details = self._rollouts
        if details.get("kept", 0) < 2:
            return
        several = any(len(counts) > 1 for counts in details["kept_by_label"].values())
        if several and details["answers"] == 1:
            message = f"all {details['kept']} successful rollouts give the same answer, so nothing else can be learned"
            if self._prompts:
                message = "all bootstrapped demonstrations show the same answer"
            advice = more_successes(self.context, (), partial_scores=False)
            yield Finding(kind="class collapse", stage=self.path, message=message, advice=advice)

    def _no_learning(self) -> Iterator[Finding]:
        """Yields findings about training that diverged, or that moved neither the loss nor the completions."""
        if self.context.optimizer.tunes != "weights":
            return
        problems = [(f"{key} keeps its weights: {error}", key, 0, True) for key, error in self._diverged().items()]
        if not self._steps:  # the losses of a policy gradient have no direction
            problems += [problem for training in self._trainings() for problem in self._flat_loss(*training)]
        steps = sum(figures["steps"] for _, figures in self._trainings())
        problems += [] if problems else [(message, "", steps, False) for message in self._no_effect(steps)]
        for message, key, count, diverging in problems:
            advice = more_learning(self.context, key, count, diverging=diverging)
            yield Finding(kind="no learning", stage=self.path, message=message, advice=advice)

    def _flat_loss(self, key: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, str, int, bool]]:
        """Yields a message, the weight key, the number of steps and whether the loss rose, if it did not fall."""
        curve, steps = loss_curve(figures["losses"]), figures["steps"]
        improved = paired_interval(self.stage.evaluation.scores, self.before.scores)[1] > 0
        if curve is None or _DIVERGED in figures or not (curve.rising or (curve.flat and not improved)):
            return
        rate = self.context.tuning_of(key).get("learning_rate")
        at = "" if rate is None else f" at a learning rate of {rate}"
        verb = "fell only" if curve.first > curve.last else "did not fall: it went"
        message = f"the loss of {key} {verb} from {curve.first:.3g} to {curve.last:.3g} in {steps} steps{at}"
        yield message, key, steps, curve.rising

    def _no_effect(self, steps: int) -> Iterator[str]:
        """Yields a message if the stage kept its weights, or if no completion seems to differ under the new ones."""
        after, trained = self.stage.evaluation, f"after {steps} training steps" if steps > 1 else "after training"
        if self.stage.result.state.weights == self.context.state.weights:
            yield f"{trained} the stage returned the weights that it started from"
        elif after.modules == self.before.modules and after.scores == self.before.scores and after.mean < 1:
            same = "the scores and the lengths of completions are the same as before"
            yield f"{trained} {same} on all {after.n} validation examples"

    def _over_fit(self) -> Iterator[Finding]:
        train, val = self.stage.train_evaluation, self.stage.evaluation
        if train is not None and train.n > 1 and val.n > 1:
            gap, error = train.mean - val.mean, math.hypot(train.stderr, val.stderr)
            if gap - Z_95 * error > 0:
                shares = [percent(part.mean, *part.interval) for part in (train, val)]
                message = f"{shares[0]} on training examples and {shares[1]} on validation examples"
                yield Finding(kind="over-fit", stage=self.path, message=message, advice=less_fitting(self.context))
        for key, training in self._trainings():
            losses = finite_values(training["eval_losses"])
            if len(losses) > 1 and losses[-1] > 1.1 * min(losses):
                best = losses.index(min(losses)) + 1
                message = f"the loss of {key} on held-out rows rose from {min(losses):.3f} to {losses[-1]:.3f}"
                advice = f"epochs={best}; the weights after epoch {best} were kept, and later epochs only took time"
                yield Finding(kind="over-fit", stage=self.path, message=message, advice=advice)


def same_failure(failure: CommonFailure | None, earlier: CommonFailure | None) -> bool:
    """Whether there are two failures and they have the same cause, however often they occurred."""
    causes = [(each.kind, each.message, set(each.modules)) for each in (failure, earlier) if each is not None]
    return len(causes) == 2 and causes[0] == causes[1]
