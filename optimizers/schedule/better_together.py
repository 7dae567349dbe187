"""The scheduler: runs named optimizers in the order of a strategy (Soylu et al. 2024, arXiv 2407.10930, Algorithm 1).

Knows nothing about prompts or LoRA, except whether an optimizer tunes prompts or weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar, cast, final

from pydantic import NonNegativeInt

from lmpipe import (
    Budget,
    Evaluation,
    Example,
    Metric,
    Module,
    Optimizer,
    OptimizeResult,
    ProgramState,
    Session,
    evaluate,
)
from lmpipe.extend import (
    CandidateScored,
    ConfigError,
    Finding,
    FindingMade,
    StageEnded,
    StageResult,
    StageStarted,
    best_index,
    check_examples,
    check_settings,
    deduplicate,
    derive_seed,
    subsample,
)
from optimizers.schedule.diagnosis import Diagnosis
from optimizers.schedule.strategy import VANILLA, Strategy, as_strategy, distinct_stages

StrategyT = TypeVar("StrategyT", bound="str | Strategy")


@final
@dataclass(frozen=True, repr=False)
class BetterTogether(Optimizer):
    """Runs the stages of a strategy one after another, each from the state that the previous one returned.

    The seed of a stage derives from the strategy up to it. So ``"p"`` and ``"p -> w -> p"`` share their first stage and
    its evaluation, which are done once in a session or store. A stage that has nothing to learn from is skipped with
    its reason, and the run continues.

    Args:
        metric: Scores the state after each stage on the validation examples.
        optimizers: Stage name → optimizer.
        strategy: A text such as ``"p -> w -> p"`` or ``"(p -> w)*2"``, or a `Strategy`, which the text is parsed into;
            ``"vanilla"`` runs no stage.
        prompts_from: Whether a prompt stage starts from the original prompts, as in Algorithm 1, or from the current
            ones.
        select: Whether the result is the state after the last stage, or the state with the best validation score among
            the initial one and those after each stage (the earliest of equals). A state that lacks
            validation scores because a budget was spent is not selected.
        budget: Budget of all stages together. Scoring the states between stages is neither limited nor counted.
        stage_budget: Budget of each stage, counted in the same way.
        num_train_scored: Number of training examples that the states are also scored on, to show over-fitting.

    Raises:
        StrategyError: If the strategy cannot be parsed or names an unknown stage.
        ConfigError: If another setting is invalid; in `optimize`, if there are no validation examples, or a stage needs
            training examples and there are none.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("val",)

    metric: Metric
    optimizers: Mapping[str, Optimizer]
    strategy: str | Strategy = "p -> w -> p"
    prompts_from: Literal["original", "current"] = "original"
    select: Literal["last", "best"] = "last"
    budget: Budget | None = None
    stage_budget: Budget | None = None
    num_train_scored: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, Strategy):
            Strategy.check_text(self.strategy)
        check_settings(self)
        object.__setattr__(self, "strategy", as_strategy(self.strategy, self.optimizers))

    @property
    def plan(self) -> str:
        return str(self.strategy)

    def optimize_all(
        self,
        strategies: Sequence[StrategyT],
        program: Module,
        state: ProgramState | None,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> dict[StrategyT, OptimizeResult]:
        """Runs several strategies as a tree: stages that strategies share at their beginning are run once.

        The cost in each result is that of the strategy alone, including the shared stages.

        Args:
            strategies: The strategies to run in place of `strategy`.
            program: See `optimize`, also for the other arguments.

        Returns:
            Strategy, as it was passed → result, in the same order.

        Raises:
            StrategyError: If a strategy cannot be parsed or names an unknown stage.
        """
        if isinstance(strategies, str):
            raise ConfigError(f"strategies is the text {strategies!r}; pass a list of strategies")
        train = deduplicate(check_examples(train, "train"), "train")
        val = check_examples(val, "val")
        parsed = [as_strategy(strategy, self.optimizers) for strategy in strategies]
        with session.track("stages of all strategies", len(distinct_stages(parsed))) as advance:
            results, done = {}, 0
            for number, (strategy, value) in enumerate(zip(strategies, parsed, strict=True), 1):
                results[strategy] = replace(self, strategy=value).optimize(program, state, train, val, session)
                so_far = len(distinct_stages(parsed[:number]))
                advance(so_far - done)
                done = so_far
        return results

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        strategy = cast(Strategy, self.strategy)  # parsed in `__post_init__`
        for name in strategy.stages:
            self.optimizers[name].require_examples(train, val)
        runner = _StageRunner(self, program, state, train, val, session)
        diagnosis = Diagnosis(strategy, self.optimizers, program, train, val, session, self.select, self.prompts_from)
        outcomes = [(state, runner.score(state, session, VANILLA))]
        first = outcomes[0][1]
        session.notify(CandidateScored(VANILLA, "initial state", first.mean, first.n))
        findings = _report(session, diagnosis.of_start(first))
        stages: list[StageResult] = []
        for prefix in strategy.prefixes():
            stage = runner.run(prefix, *outcomes[-1], [earlier.result for earlier in stages])
            findings += _report(session, diagnosis.of_stage(prefix, first, *outcomes[-1], stage))
            stages.append(stage)
            outcomes.append((stage.result.state, stage.evaluation))
        findings += _report(session, diagnosis.of_run(stages))
        chosen, evaluation = outcomes[-1]
        if self.select == "best":
            number = best_index(outcome[1].comparable_mean for outcome in outcomes)
            chosen, evaluation = outcomes[number or 0]
            findings += _report(session, [diagnosis.no_choice()] if number is None else [])
        skipped = bool(stages) and all(stage.result.status == "skipped" for stage in stages)
        return OptimizeResult(
            state=chosen,
            status="skipped" if skipped else "done",
            reason=stages[-1].result.reason if skipped else "",
            stopped=next((stage.result.stopped for stage in stages if stage.result.stopped), ""),
            evaluation=evaluation,
            initial=first,
            stages=tuple(stages),
            findings=tuple(findings),
        )


def _report(session: Session, findings: Iterable[Finding]) -> list[Finding]:
    """Returns findings as a list, and notifies the session of each."""
    reported = list(findings)
    for finding in reported:
        session.notify(FindingMade(finding.stage, finding.kind, finding.message, finding.advice))
    return reported


@final
class _StageRunner:
    """Runs and scores the stages of one strategy."""

    def __init__(
        self,
        settings: BetterTogether,
        program: Module,
        original: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> None:
        self._settings, self._program, self._original = settings, program, original
        self._train, self._val, self._session = train, val, session
        self._spending = session.limited(settings.budget) if settings.budget else session
        self._scored = subsample(train, settings.num_train_scored, derive_seed(session.seed, "scored"))

    def run(
        self, strategy: Strategy, state: ProgramState, evaluation: Evaluation, earlier: Sequence[OptimizeResult]
    ) -> StageResult:
        """Runs the last stage of a strategy on the state after the stages before it, and scores the new state."""
        path, name = str(strategy), strategy.stages[-1]
        optimizer = self._settings.optimizers[name].after(earlier)
        total = len(cast(Strategy, self._settings.strategy).stages)
        number, seed = len(strategy.stages), self._session.run_seed
        self._session.notify(StageStarted(path, type(optimizer).__name__, number, total, seed))
        stage = self._spending.for_stage(path)
        result = self._optimize(optimizer, state, stage)
        cost = stage.ledger.total
        train_evaluation = None
        if result.status == "skipped":
            result = result.model_copy(update={"state": state})
        else:
            measuring = self._session.metered()
            evaluation = self.score(result.state, measuring, path)
            if self._scored:
                train_evaluation = self.score(result.state, measuring, f"{path}, training examples", self._scored)
            cost += measuring.ledger.total
        score = (evaluation.mean, evaluation.stderr, cost, evaluation.interval, evaluation.n)
        self._session.notify(StageEnded(path, result.status, *score, result.reason))
        return StageResult(
            name=name, result=result, evaluation=evaluation, train_evaluation=train_evaluation, cost=cost
        )

    def score(
        self, state: ProgramState, session: Session, what: str, examples: Sequence[Example] | None = None
    ) -> Evaluation:
        """Scores a state on the validation examples, whose traces are kept, or on other examples."""
        return evaluate(
            self._program,
            self._val if examples is None else examples,
            self._settings.metric,
            session,
            state=state,
            title=f"scoring {what}",
            keep_traces=examples is None,
        )

    def _optimize(self, optimizer: Optimizer, state: ProgramState, stage: Session) -> OptimizeResult:
        if reason := stage.ledger.reached_limit():
            text = f"the budget was spent before the stage began ({reason})"
            return OptimizeResult(state=state, status="skipped", reason=text, stopped=reason)
        restart = optimizer.tunes == "prompts" and self._settings.prompts_from == "original"
        start = state.with_prompts_of(self._original) if restart else state
        limited = stage.limited(self._settings.stage_budget) if self._settings.stage_budget else stage
        return optimizer.optimize(self._program, start, self._train, self._val, limited)
