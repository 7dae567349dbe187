"""What weight optimizers have in common: whose rows train which weights, and what is reported of a training.

Knows nothing of where rows come from.
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
"""Figure of a training that diverged: what happened, in words."""


@dataclass(frozen=True)
class WeightSettings(WeightOptimizer):
    """What all weight optimizers are set by.

    Args:
        metric: Scores a run.
        trainer: Turns rows into weights; one for each role where roles have different LMs.
        adapters: One adapter for each LM role, trained on the rows of all its modules; or one for each module.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train",)

    metric: Metric
    trainer: Trainer | Mapping[str, Trainer]
    adapters: Literal["role", "module"] = "role"

    @final
    def check_trainers(self, program: Module, session: Session) -> None:
        """Looks whether all can be trained that gives rows, before any run is made.

        Raises:
            ConfigError: If there are trainers by role and one of the program's roles has none.
            SessionError: If the session has no store, which trained weights are kept in.
        """
        if session.store is None:
            raise SessionError("trained weights are kept in a store; write: Session(lm=..., store=RunStore(...))")
        roles = dict.fromkeys(predictor.role for predictor in predictors(program).values())
        known = roles if isinstance(self.trainer, Trainer) else self.trainer
        if lacking := [role for role in roles if role not in known]:
            raise ConfigError(
                f"{type(self).__name__}: there is no trainer for role {', '.join(map(repr, lacking))}; the program's "
                f"roles are {', '.join(roles)}, and there are trainers for {', '.join(known) or 'none'}"
            )

    @final
    def key(self, predictor: Predict, path: str) -> str:
        """The weight key (a role, or ``"role/path"``) that the calls of a module train."""
        return predictor.role if self.adapters == "role" else f"{predictor.role}/{path}"

    @final
    def tune(
        self,
        state: ProgramState,
        rows: Mapping[str, Sequence[TrainingRow]],
        session: Session,
        objective: Objective = SFTLoss(),
        init: Literal["base", "current"] = "current",
    ) -> tuple[ProgramState, dict[str, Any]]:
        """Trains on the rows of each weight key, until a budget is spent.

        Args:
            state: Where the weights are replaced.
            rows: Weight key → its rows.
            session: Of the stage.
            objective: What is made of the rows.
            init: Whether training starts from the base or from the current weights.

        Returns:
            The state with the new weights, and weight key → figures of its training. A training that diverged leaves
            the weights of its key as they are, and says why under `DIVERGED`.
        """
        details: dict[str, Any] = {}
        for key, own in rows.items():
            if session.ledger.reached_limit():
                break
            role, _, path = key.partition("/")
            current = state.weights_of(role, path)
            start = current if init == "current" else WeightState(base=current.base)
            trainer = self.trainer if isinstance(self.trainer, Trainer) else self.trainer[role]
            lines = "".join(canonical_json(asdict(row)) + "\n" for row in own)
            blob = session.store.put_blob(lines.encode()) if session.store else None
            figures: dict[str, Any] = {"rows": len(own), "rows_blob": blob}
            try:
                trained = trainer.train(own, start, session, objective)
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
    def tuned(
        self,
        state: ProgramState,
        rows: Mapping[str, Sequence[TrainingRow]],
        session: Session,
        details: Mapping[str, Any],
        objective: Objective = SFTLoss(),
        init: Literal["base", "current"] = "current",
    ) -> OptimizeResult:
        """What a stage ends with that trains once: as `tune`, or skipped if nothing came of any training.

        Args:
            state: See `tune`, as for what is not listed here.
            details: What there is to report beside the training.
        """
        state, training = self.tune(state, rows, session, objective, init)
        details = {**details, "training": training}
        if any(DIVERGED not in figures for figures in training.values()):
            return OptimizeResult(state=state, details=details)
        reason = divergences([training]) or f"there was no budget left to train with ({session.ledger.reached_limit()})"
        return OptimizeResult(state=state, status="skipped", reason=reason, details=details)


def divergences(trainings: Iterable[Mapping[str, Any]]) -> str:
    """Which trainings diverged and why, in words; empty if none.

    Args:
        trainings: Figures as `WeightSettings.tune` gives them.
    """
    every = (f"{key}: {figures[DIVERGED]}" for own in trainings for key, figures in own.items() if DIVERGED in figures)
    return "; ".join(every)


def messages_of_step(
    predictor: Predict, step: Step, state: ProgramState, session: Session, *, include_demos: bool
) -> tuple[Message, ...]:
    """What inference would send for the inputs of a call: under the vanilla prompt, or under the current one."""
    prompt = state.prompts.get(step.path, predictor.initial_prompt) if include_demos else predictor.initial_prompt
    return session.render_messages(predictor.signature, prompt, step.inputs)


def ended(step: Step) -> bool:
    """Whether the completion of a call ended by itself, and was not cut off at its most tokens."""
    return step.usage.completion_tokens < step.request.sampling.max_tokens
