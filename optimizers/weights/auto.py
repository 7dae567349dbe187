"""The weight optimizer that finds its own settings: it explores, balances, tries learning rates, and checks the result.

Knows which states are compared; how rollouts are found is in `exploration`, and how trials end in `trials`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field, NonNegativeFloat, PositiveInt

from lmpipe import (
    Evaluation,
    Example,
    Module,
    OptimizeResult,
    ProgramState,
    Session,
    WeightState,
    evaluate,
    predictors,
)
from lmpipe.extend import (
    TrainingRow,
    UnitInterval,
    check_settings,
    derive_seed,
    evaluate_many,
    paired_interval,
    percent,
    points,
    subsample,
)
from optimizers.rollouts import class_label
from optimizers.weights.exploration import ExplorationSettings, explore
from optimizers.weights.rows import rows_of_traces
from optimizers.weights.settings import DIVERGED, WeightSettings, divergence_reason
from optimizers.weights.trials import Trial, TrialSettings, train_by_trials

_Rate = Annotated[float, Field(gt=0, le=1)]


@final
@dataclass(frozen=True, repr=False)
class AutoFinetune(WeightSettings):
    """Fine-tunes on a program's own successful rollouts, with settings that are chosen on the task at hand.

    It *explores* until every training example has a successful rollout (`optimizers.weights.exploration`), *balances*
    the rows by class where the examples have classes, *tries* learning rates and numbers of steps by the score on
    validation examples under the vanilla prompt, which the rows show (`optimizers.weights.trials`), and *checks* that
    the new weights beat the old ones there, each under the better one of the vanilla and the current prompt. Weights
    that do not are not returned, and the optimizer counts as skipped.

    `BootstrapFinetune` trains with settings that are given. `WeightSettings` documents the other parameters.

    Args:
        metric_threshold: Minimum score of a successful rollout.
        rollouts_per_example: Number of rollouts of each example in a round.
        max_rollouts_per_example: Maximum number of rollouts of an example.
        max_idle_rounds: Number of successive rounds without a newly solved example after which no further one is made.
        temperature: Sampling temperature of the rollouts.
        hint: Whether examples that remain unsolved are run once more with the correct answer in the instructions (STaR:
            Zelikman et al. 2022, arXiv 2203.14465).
        learning_rates: Learning rates to try.
        first_steps: Number of steps with each rate before the first comparison.
        steps: Number of steps between two scores, at least half a pass over the rows.
        max_steps: Maximum number of steps with one rate, at least three passes over the rows.
        patience: Number of successive scores without improvement after which training ends.
        batch_size: Number of rows of a step.
        num_val: Number of validation examples that trials are scored on; None means all. The check uses all.
        prompts: Other states whose prompts are explored; a search before this stage adds those that did well.

    Raises:
        ConfigError: If a setting is out of its range; in `optimize`, if there are no training or validation examples,
            or a trainer has no settings that can be changed.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train", "val")

    metric_threshold: UnitInterval = 1.0
    rollouts_per_example: PositiveInt = 2
    max_rollouts_per_example: PositiveInt = 64
    max_idle_rounds: PositiveInt = 6
    temperature: NonNegativeFloat = 0.8
    hint: bool = False
    learning_rates: tuple[_Rate, ...] = (1e-3, 3e-4)
    first_steps: PositiveInt = 50
    steps: PositiveInt = 25
    max_steps: PositiveInt = 150
    patience: PositiveInt = 2
    batch_size: PositiveInt = 6
    num_val: PositiveInt | None = 100
    prompts: tuple[ProgramState, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)

    def after(self, earlier: Sequence[OptimizeResult]) -> AutoFinetune:
        found = [state for result in earlier[-1:] for state in result.runners_up]
        return replace(self, prompts=(*self.prompts, *found))

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        self.check_trainers(program, session)
        label = class_label(program, train)
        rollouts, figures = explore(program, state, train, session, self._exploration(label))
        details = {**rollouts.details(), **figures}
        if not rollouts.kept:
            cause = rollouts.failure_cause()
            reason = (
                f"none of {rollouts.tried} rollouts on {len(train)} training examples scored {self.metric_threshold} "
                f"or more, so there is nothing to train on{cause and f': {cause}'}"
            )
            return OptimizeResult(state=state, status="skipped", reason=reason, details=details)
        rows = rows_of_traces(program, state, rollouts.kept, session, self.weight_key, label=label)
        rows = {key: list(dict.fromkeys(key_rows)) for key, key_rows in rows.items()}
        session.notify(rollouts.event(session.stage, sum(map(len, rows.values()))))
        tuned, training = self._train(program, state, rows, val, session, label)
        details["training"] = training
        if tuned == state:
            reason = divergence_reason([training]) or f"there was no budget to train ({session.ledger.reached_limit()})"
            return OptimizeResult(state=state, status="skipped", reason=reason, details=details)
        return self._checked(program, state, tuned, val, session, details)

    def _exploration(self, label: str | None) -> ExplorationSettings:
        return ExplorationSettings(
            self.metric,
            self.metric_threshold,
            self.rollouts_per_example,
            self.max_rollouts_per_example,
            self.max_idle_rounds,
            self.temperature,
            label,
            self.prompts,
            self.hint,
        )

    def _train(
        self,
        program: Module,
        state: ProgramState,
        rows: Mapping[str, Sequence[TrainingRow]],
        val: Sequence[Example],
        session: Session,
        label: str | None,
    ) -> tuple[ProgramState, dict[str, Any]]:
        """Trains the weights of each key from the base, and returns the new state and the figures of the training."""
        scored = subsample(val, self.num_val, derive_seed(session.seed, "val"), label)
        training: dict[str, Any] = {}
        for key, key_rows in rows.items():
            if session.ledger.reached_limit():
                break
            role, _, path = key.partition("/")
            start = WeightState(base=state.weights_of(role, path).base)

            def score(weights: WeightState, current: ProgramState = state, key: str = key) -> float:
                tried = _vanilla(program, current).with_weights(key, weights)
                return evaluate(program, scored, self.metric, session, state=tried, title="trial").mean

            settings = self._trials(len(key_rows))
            trials = train_by_trials(key_rows, start, self.trainer_of(role), score, session, settings)
            training[key] = {**self.kept_rows(key_rows, session), **_figures(trials)}
            if trials[0].best is not None:
                state = state.with_weights(key, trials[0].best)
        return state, training

    def _trials(self, rows: int) -> TrialSettings:
        half = -(-rows // (2 * self.batch_size))
        steps = max(self.steps, half)
        return TrialSettings(
            self.learning_rates,
            max(self.first_steps, steps),
            steps,
            max(self.max_steps, 6 * half),
            self.patience,
            self.batch_size,
        )

    def _checked(
        self,
        program: Module,
        before: ProgramState,
        after: ProgramState,
        val: Sequence[Example],
        session: Session,
        details: Mapping[str, Any],
    ) -> OptimizeResult:
        """Returns the new state if it beats the old one on the validation examples by the paired interval."""
        states = [before, _vanilla(program, before), after, _vanilla(program, after)]
        evaluations = evaluate_many(program, states, val, self.metric, session, title="check")
        old, new = (_better(pair) for pair in (evaluations[:2], evaluations[2:]))
        gain, low, high = paired_interval(new.scores, old.scores)
        figures = {"before": old.mean, "after": new.mean, "gain": gain, "low": low, "high": high}
        details = {**details, "check": figures}
        if low > 0:
            return OptimizeResult(state=after, details=details)
        reason = (
            f"the trained weights score {percent(new.mean, *new.interval)} on {new.n} validation examples, and those "
            f"before {percent(old.mean, *old.interval)}: a difference of {points(gain, low, high)} points shows no "
            "gain, so they are not handed on"
        )
        return OptimizeResult(state=before, status="skipped", reason=reason, details=details)


def _vanilla(program: Module, state: ProgramState) -> ProgramState:
    """Returns the state with the prompts that the program is written with."""
    return state.with_prompts({path: predictor.initial_prompt for path, predictor in predictors(program).items()})


def _better(pair: Sequence[Evaluation]) -> Evaluation:
    return max(pair, key=lambda evaluation: evaluation.mean)


def _figures(trials: Sequence[Trial]) -> dict[str, Any]:
    """Returns the figures of the best trial, in the form of `WeightSettings.tune`, and those of all trials."""
    best = trials[0]
    figures = {
        "steps": sum(trial.steps[-1] for trial in trials if trial.steps),
        "tokens": sum(trial.tokens for trial in trials),
        "losses": best.losses,
        "eval_losses": [],
        "trials": [trial.figures() for trial in trials],
    }
    return {**figures, DIVERGED: best.diverged} if best.best is None else figures
