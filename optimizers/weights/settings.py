"""Settings and steps that weight optimizers share: which rows train which weights, and the figures of training.

Knows nothing about where rows come from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, final

from lmpipe import (
    Metric,
    Module,
    OptimizeResult,
    Predict,
    ProgramState,
    Session,
    Step,
    Trainer,
    WeightOptimizer,
    WeightState,
    predictors,
)
from lmpipe.extend import (
    ConfigError,
    Message,
    Objective,
    SessionError,
    SFTLoss,
    TrainingDiverged,
    TrainingRow,
    canonical_json,
)

logger = logging.getLogger(__name__)

DIVERGED = "diverged"
"""Key in the figures of training that diverged; its value is the error message."""


@dataclass(frozen=True, repr=False)
class WeightSettings(WeightOptimizer):
    """Settings and steps that all weight optimizers share.

    Args:
        metric: Scores a prediction.
        trainer: Trains weights on rows; or one trainer for each role, if the roles have different LMs.
        adapters: Whether each LM role has one adapter, trained on the rows of all its modules, or each module has one.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train",)

    metric: Metric
    trainer: Trainer | Mapping[str, Trainer]
    adapters: Literal["role", "module"] = "role"

    @final
    def check_trainers(self, program: Module, session: Session) -> None:
        """Checks before any rollout that every role of the program can be trained.

        Raises:
            ConfigError: If trainers are given by role and one of the program's roles has none.
            SessionError: If the session has no store to keep trained weights in.
        """
        if session.store is None:
            raise SessionError("trained weights are kept in a store; pass Session(lm=..., store=RunStore(...))")
        roles = dict.fromkeys(predictor.role for predictor in predictors(program).values())
        trainable = roles if isinstance(self.trainer, Trainer) else self.trainer
        if lacking := [role for role in roles if role not in trainable]:
            raise ConfigError(
                f"{type(self).__name__}: there is no trainer for role {', '.join(map(repr, lacking))}; the program's "
                f"roles are {', '.join(roles)}, and there are trainers for {', '.join(trainable) or 'none'}"
            )

    @final
    def weight_key(self, predictor: Predict, path: str) -> str:
        """Returns the key of the weights that a module's calls train: a role, or ``"role/path"``."""
        return predictor.role if self.adapters == "role" else f"{predictor.role}/{path}"

    @final
    def trainer_of(self, role: str) -> Trainer:
        """Returns the trainer of a role."""
        return self.trainer if isinstance(self.trainer, Trainer) else self.trainer[role]

    @final
    def kept_rows(self, rows: Sequence[TrainingRow], session: Session) -> dict[str, Any]:
        """Puts training rows into the session's store, and returns their number and the digest of the blob."""
        lines = "".join(canonical_json(asdict(row)) + "\n" for row in rows)
        return {"rows": len(rows), "rows_blob": session.store.put_blob(lines.encode()) if session.store else None}

    @final
    def tune(
        self,
        state: ProgramState,
        rows: Mapping[str, Sequence[TrainingRow]],
        session: Session,
        objective: Objective = SFTLoss(),
        init: Literal["base", "current"] = "current",
    ) -> tuple[ProgramState, dict[str, Any]]:
        """Trains the weights of each key on its rows, until a budget is spent.

        Args:
            state: The state whose weights are replaced.
            rows: Weight key → training rows.
            session: Session of the stage.
            objective: The training objective.
            init: Whether training starts from the base or from the current weights.

        Returns:
            The state with the new weights, and weight key → figures of its training. Training that diverged leaves
            the weights of its key unchanged, and its figures contain the error message under `DIVERGED`.
        """
        details: dict[str, Any] = {}
        for key, key_rows in rows.items():
            if session.ledger.reached_limit():
                break
            role, _, path = key.partition("/")
            current = state.weights_of(role, path)
            start = current if init == "current" else WeightState(base=current.base)
            figures = self.kept_rows(key_rows, session)
            try:
                trained = self.trainer_of(role).train(key_rows, start, session, objective)
            except TrainingDiverged as error:
                logger.warning("%s keeps its weights: %s", key, error)
                details[key] = {
                    **figures,
                    "steps": error.step,
                    "losses": list(error.losses),
                    "eval_losses": [],
                    DIVERGED: str(error),
                }
                continue
            state = state.with_weights(key, trained.weights)
            details[key] = {
                **figures,
                "steps": trained.steps,
                "tokens": trained.tokens,
                "losses": list(trained.losses),
                "eval_losses": list(trained.eval_losses),
            }
        return state, details

    @final
    def tune_result(
        self,
        state: ProgramState,
        rows: Mapping[str, Sequence[TrainingRow]],
        session: Session,
        details: Mapping[str, Any],
        objective: Objective = SFTLoss(),
        init: Literal["base", "current"] = "current",
    ) -> OptimizeResult:
        """Trains as `tune` does, and returns the result of the stage; it is skipped if no training succeeded.

        Args:
            state: See `tune`, also for the arguments that are not listed here.
            details: Figures to report in addition to those of the training.
        """
        state, training = self.tune(state, rows, session, objective, init)
        details = {**details, "training": training}
        if any(DIVERGED not in figures for figures in training.values()):
            return OptimizeResult(state=state, details=details)
        reason = (
            divergence_reason([training])
            or f"there was no budget left to train with ({session.ledger.reached_limit()})"
        )
        return OptimizeResult(state=state, status="skipped", reason=reason, details=details)


def divergence_reason(trainings: Iterable[Mapping[str, Any]]) -> str:
    """Says which trainings diverged and why; empty if none did.

    Args:
        trainings: Figures of trainings, as `WeightSettings.tune` returns them.
    """
    return "; ".join(
        f"{key}: {figures[DIVERGED]}"
        for training in trainings
        for key, figures in training.items()
        if DIVERGED in figures
    )


def step_messages(
    predictor: Predict, step: Step, state: ProgramState, session: Session, *, include_demos: bool
) -> tuple[Message, ...]:
    """Returns the messages that inference would send for the inputs of a call, with the vanilla or current prompt."""
    prompt = state.prompts.get(step.path, predictor.initial_prompt) if include_demos else predictor.initial_prompt
    return session.render_messages(predictor.signature, prompt, step.inputs)


def is_finished(step: Step) -> bool:
    """Whether the completion of a call ended by itself and was not cut off at the maximum number of tokens."""
    return step.usage.completion_tokens < step.request.sampling.max_tokens
