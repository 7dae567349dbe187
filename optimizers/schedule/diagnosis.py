"""Diagnosis of a run: explains in words what went wrong, from the results of the stages.

It looks for failures that Soylu et al. 2024 (arXiv 2407.10930) do not analyse, such as completions that cannot be read,
or no gain from alternating; `optimizers.schedule.stage_diagnosis` looks for those of a single stage. The findings about
a stage can be had as soon as it has ended. Knows nothing about how a report shows the findings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from lmpipe import Evaluation, Example, Module, Optimizer, ProgramState, Session
from lmpipe.extend import (
    CommonFailure,
    Finding,
    ModuleCost,
    StageResult,
    dominant_failure,
    paired_interval,
    percent,
    points,
)
from optimizers.schedule.advice import StageContext, against_failure, against_unreadable, listed
from optimizers.schedule.stage_diagnosis import StageDiagnosis, same_failure
from optimizers.schedule.strategy import VANILLA, Strategy

_UNREADABLE_SHARE = 0.5  # share of a module's calls that cannot be read, from which the module is reported


@final
@dataclass(frozen=True)
class Diagnosis:
    """Finds what a researcher should know about a run, while it goes on.

    Args:
        strategy: The strategy that runs.
        optimizers: Stage name → optimizer.
        program: The program.
        train: The training examples.
        val: The validation examples.
        session: Session of the run.
        select: See `optimizers.BetterTogether`.
        prompts_from: See `optimizers.BetterTogether`.
    """

    strategy: Strategy
    optimizers: Mapping[str, Optimizer]
    program: Module
    train: Sequence[Example]
    val: Sequence[Example]
    session: Session
    select: Literal["last", "best"] = "last"
    prompts_from: Literal["original", "current"] = "original"

    def of_start(self, evaluation: Evaluation) -> Iterator[Finding]:
        """Yields the findings about the initial state, given its evaluation."""
        yield from self._failing(VANILLA, evaluation)

    def of_stage(
        self, prefix: Strategy, initial: Evaluation, state: ProgramState, before: Evaluation, stage: StageResult
    ) -> Iterator[Finding]:
        """Yields the findings about one stage.

        Args:
            prefix: The strategy up to and including the stage.
            initial: Evaluation of the state before all stages.
            state: The state before the stage.
            before: Evaluation of that state.
            stage: Result of the stage.
        """
        earlier = [self.optimizers[name] for name in prefix.stages[:-1]]
        context = StageContext(
            optimizer=self.optimizers[stage.name],
            program=self.program,
            state=state,
            session=self.session,
            train=self.train,
            val=self.val,
            after_prompts=any(optimizer.tunes == "prompts" for optimizer in earlier),
            ended=stage.result.details.get("ended", "limit"),
        )
        path = str(prefix)
        diagnosis = StageDiagnosis(path, context, initial, before, stage)
        if stage.result.status == "skipped":
            yield diagnosis.skipped()
            return
        yield from diagnosis.findings()
        if not same_failure(_dominant(stage.evaluation), _dominant(before)):  # which was reported then
            yield from self._failing(path, stage.evaluation)
        yield from self._worse(prefix, context, before, stage.evaluation)
        yield from self._all_alike(prefix, context, before, stage)

    def of_run(self, stages: Sequence[StageResult]) -> Iterator[Finding]:
        """Yields the findings about all stages together: whether alternating was worth it."""
        kinds = {self.optimizers[name].tunes for name in self.strategy.stages}
        if len(kinds) < 2 or any(stage.result.status == "skipped" for stage in stages):
            return
        name, alone, last = self.strategy.stages[0], stages[0].evaluation, stages[-1].evaluation
        gain, low, high = paired_interval(last.scores, alone.scores)
        if low <= 0 and all(map(math.isfinite, (low, alone.mean, last.mean))):
            message = (
                f"after {name} alone {percent(alone.mean, *alone.interval)}, after all stages "
                f"{percent(last.mean, *last.interval)}: a difference of {points(gain, low, high)} points does not show "
                "a gain"
            )
            advice = "more validation examples to see smaller gains; otherwise the shorter strategy, which is cheaper"
            yield Finding(kind="no gain", stage=str(self.strategy), message=message, advice=advice)

    def no_choice(self) -> Finding:
        """Returns the finding for a run that should select the best state, but has no fully scored state."""
        message = f"no state was scored on all {len(self.val)} validation examples, so the initial state is the result"
        return Finding(kind="no choice", stage=str(self.strategy), message=message, advice="a larger budget")

    def _failing(self, path: str, evaluation: Evaluation) -> Iterator[Finding]:
        """Yields a finding if nearly all rollouts failed alike, or if half of a module's calls could not be read."""
        total, failure = _total(evaluation), _dominant(evaluation)
        share = _UNREADABLE_SHARE if failure is None else 0.0
        modules = {
            module: cost
            for module, cost in evaluation.modules.items()
            if cost.parse_errors and cost.parse_errors >= share * cost.calls
        }
        if failure is not None and (failure.kind != "parse" or not modules):
            text = failure.summary(total)
            advice = against_failure(failure, self.program, self.session, evaluation.modules)
        elif modules:
            text = " and ".join(_unreadable(module, cost) for module, cost in modules.items()) + " could not be read"
            parse = [common.message for common in evaluation.common_failures if common.kind == "parse"]
            text += f": {parse[0]}" if parse else ""
            advice = against_unreadable(modules, self.program, self.session, evaluation.modules)
        else:
            return
        yield Finding(kind="failing", stage=path, message=f"on validation examples {text}", advice=advice)

    def _worse(
        self, prefix: Strategy, context: StageContext, before: Evaluation, after: Evaluation
    ) -> Iterator[Finding]:
        change, low, high = paired_interval(after.scores, before.scores)
        if high < 0:
            message = f"the score fell by {points(-change, -high, -low, sign='')} points"
            advice = listed(self._against_loss(prefix, context), "another optimizer for this stage, or none")
            yield Finding(kind="worse", stage=str(prefix), message=message, advice=advice)

    def _all_alike(
        self, prefix: Strategy, context: StageContext, before: Evaluation, stage: StageResult
    ) -> Iterator[Finding]:
        """Yields a finding about a prompt search whose candidates all have the same score, none better than before."""
        candidates, after = stage.result.candidates, stage.evaluation
        scores = {(candidate.mean, candidate.n) for candidate in candidates}
        distinct = len({candidate.state for candidate in candidates}) > 1
        if context.optimizer.tunes != "prompts" or not distinct or len(scores) > 1 or after.mean == 1:
            return
        unread = dominant_failure(after.common_failures, after.n) is not None  # which is a finding of its own
        if not unread and after.mean == before.mean:
            message = (
                f"all {len(candidates)} candidates scored {100 * candidates[0].mean:.0f} %, and the validation score "
                "is the same as before, so the prompts that were tried do not matter to this LM"
            )
            advice = listed(self._against_indifference(prefix, context), "a stronger LM")
            yield Finding(kind="no gain", stage=str(prefix), message=message, advice=advice)

    def _against_indifference(self, prefix: Strategy, context: StageContext) -> Iterator[str]:
        """Yields what to do about an LM that scores the same with any prompt."""
        kinds = [self.optimizers[name].tunes for name in self.strategy.stages]
        if "weights" not in kinds:
            yield "a weight stage"
        elif "prompts" not in kinds[len(prefix.stages) :] and "weights" in kinds[len(prefix.stages) :]:
            yield "a prompt stage after the weight stage"
        yield from context.wider("num_val", len(self.val))

    def _against_loss(self, prefix: Strategy, context: StageContext) -> Iterator[str]:
        """Yields what to do about a stage that lowers the score."""
        following = self.strategy.stages[len(prefix.stages) :][:1]
        if self.select == "last":
            yield "select='best' (which can keep the state before)"
        if context.optimizer.tunes == "weights":
            if not any(self.optimizers[name].tunes == "prompts" for name in following):
                yield "a prompt stage after it (tuned weights need other prompts)"
            if context.settings.get("include_demos") is False and context.shows_demos:
                yield "include_demos=True"
            rate = context.tuning_of().get("learning_rate")
            if rate is not None:
                yield f"learning_rate below {rate}"
        elif context.optimizer.tunes == "prompts":
            if self.prompts_from == "original" and context.after_prompts:
                yield "prompts_from='current'"
            yield from context.wider("num_val", len(self.val))


def _total(evaluation: Evaluation) -> int:
    return evaluation.n + evaluation.failures.get("budget", 0)


def _dominant(evaluation: Evaluation) -> CommonFailure | None:
    """Returns the failure of nearly all rollouts, if they have one in common."""
    return dominant_failure(evaluation.common_failures, _total(evaluation))


def _unreadable(module: str, cost: ModuleCost) -> str:
    count = f"all {cost.calls}" if cost.parse_errors == cost.calls else f"{cost.parse_errors} of {cost.calls}"
    return f"{count} calls of {'the program' if module == 'self' else module}"
